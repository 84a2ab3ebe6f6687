"""Every error that crosses a wall of the house, in one table.

A code is ``area.name``. The same code stands in an HTTP problem document, in
a device's receipt and in the log, so that a person can follow one failure
from the device to the console.
"""

from collections.abc import Mapping
from typing import Final

import msgspec


class ErrorSpec(msgspec.Struct, frozen=True):
    """What is known of a code before it happens."""

    summary: str
    remedy: str
    retryable: bool = False


ERRORS: Final[Mapping[str, ErrorSpec]] = {
    # --- messages and documents
    "message.malformed": ErrorSpec("A message cannot be decoded.", "Correct the field that the path names."),
    "message.too_large": ErrorSpec(
        "A message is larger than its limit.", "Send smaller batches; the limit is in the message."
    ),
    "message.wrong_device": ErrorSpec(
        "A message names another device than its topic.",
        "A device may only speak for itself; check for a copied identity.",
    ),
    "message.unsupported_version": ErrorSpec(
        "A message speaks another protocol version.", "Upgrade the older of the two sides."
    ),
    # --- packages
    "package.manifest_invalid": ErrorSpec(
        "The manifest is not valid.", "Correct the field that the path names."
    ),
    "package.file_missing": ErrorSpec(
        "A file that the manifest names is missing.", "Add the file or build the package again."
    ),
    "package.file_mismatch": ErrorSpec(
        "A file differs from the manifest in length or hash.", "Build the package again."
    ),
    "package.too_large": ErrorSpec(
        "A file is larger than the limit.", "Quantise or prune the model, or raise the limit."
    ),
    "package.unsafe_model": ErrorSpec(
        "The model uses something that is not allowed.",
        "Export it as one file, with standard operators only.",
    ),
    # --- inference
    "inference.runtime_missing": ErrorSpec(
        "No runtime for this format is installed.", "Install the runtime that the message names."
    ),
    "inference.accelerator_missing": ErrorSpec(
        "The accelerator is not available here.", "Install its driver or choose another variant."
    ),
    "inference.load_failed": ErrorSpec("The model does not load.", "Check the file and its format."),
    "inference.bad_input": ErrorSpec(
        "An input does not fit the model.", "Send the shape and datatype that the message names."
    ),
    "inference.run_failed": ErrorSpec("The model failed while running.", "See the detail."),
    "inference.out_of_memory": ErrorSpec(
        "The model asks for more memory than its process may take.",
        "Ask for less at once, use a smaller model, or raise the process's limit.",
    ),
    "inference.not_finite": ErrorSpec(
        "The model returned NaN or infinity.", "Check the input range and the quantisation."
    ),
    # --- probe
    "probe.golden_mismatch": ErrorSpec(
        "Outputs differ from the golden vectors by more than the tolerance.",
        "The model, the runtime or the kernel differs from the one that was released.",
    ),
    "probe.crashed": ErrorSpec("The probe process died.", "The model crashes its runtime; see the signal."),
    "probe.timeout": ErrorSpec(
        "The probe did not end in time.", "The model hangs or the device is too slow."
    ),
    "probe.over_budget": ErrorSpec(
        "The model needs more memory or time than its budget.", "Use a smaller variant."
    ),
    "probe.no_variant": ErrorSpec(
        "No variant of the model can run on this device.",
        "Add a variant for this architecture and these accelerators.",
    ),
    "probe.unconfined": ErrorSpec(
        "The sandbox that the configuration requires is not available.",
        "Use a kernel with Landlock, install libseccomp, or do not require the sandbox.",
    ),
    # --- optimising and importing models
    "optimise.over_tolerance": ErrorSpec(
        "A variant loses more accuracy than its tolerance allows; it was not written.",
        "Use a milder technique, more calibration data, or state a wider tolerance.",
    ),
    "optimise.failed": ErrorSpec("A variant of the model could not be made.", "See the detail."),
    "optimise.tool_missing": ErrorSpec(
        "A tool that makes variants is not installed.", "Install the package that the message names."
    ),
    "import.converter_missing": ErrorSpec(
        "The converter for this kind of model is not installed.",
        "Run the command that the message names, or name an interpreter that has it with --python.",
    ),
    "import.untrusted": ErrorSpec(
        "Opening this file runs whatever code is in it.",
        "Use a format that holds no code, or say that you trust the file.",
    ),
    "import.failed": ErrorSpec("The model could not be converted.", "See the detail."),
    "import.differs": ErrorSpec(
        "The converted model does not answer as the original does.",
        "Compare on rows of your own (--inputs), or allow a share of the values to differ (--differing).",
    ),
    # --- updates
    "update.metadata_invalid": ErrorSpec(
        "Signed metadata is not valid.", "Check the signatures; the device keeps what it has."
    ),
    "update.metadata_inconsistent": ErrorSpec(
        "Signed metadata of different times were put together.",
        "Publish again; the device keeps what it has.",
    ),
    "update.metadata_too_large": ErrorSpec(
        "Signed metadata is larger than its limit.", "Check the server; the device keeps what it has."
    ),
    "update.metadata_expired": ErrorSpec(
        "Signed metadata has expired.", "Let the control plane sign again.", retryable=True
    ),
    "update.metadata_rollback": ErrorSpec(
        "Signed metadata is older than what the device has seen.",
        "Restore the newest metadata; a device never goes back.",
    ),
    "update.wrong_device": ErrorSpec(
        "The assignment is meant for another device.", "Each device takes only its own assignment."
    ),
    "update.not_released": ErrorSpec(
        "The director names a model that no release key has signed.", "Release the model first."
    ),
    "update.repositories_disagree": ErrorSpec(
        "Director and image repository disagree on a file.", "Publish again; nothing was installed."
    ),
    "update.below_floor": ErrorSpec(
        "The version is below the signed floor of its model.", "Roll out a version at or above it."
    ),
    "update.hash_mismatch": ErrorSpec(
        "A downloaded file differs from its signed hash.",
        "The file was changed in storage or on the way; restore the original.",
    ),
    "update.length_mismatch": ErrorSpec(
        "A downloaded file differs from its signed length.",
        "The file was changed in storage or on the way; restore the original.",
    ),
    "update.not_found": ErrorSpec("The server does not have a file.", "Upload it again.", retryable=True),
    "update.unreachable": ErrorSpec(
        "The update server cannot be reached.", "Check the network; the device tries again.", retryable=True
    ),
    "update.disk_full": ErrorSpec("No room for the download.", "Free some space.", retryable=True),
    # --- install and trial
    "install.interrupted": ErrorSpec("The install was cut off.", "It goes on by itself.", retryable=True),
    "trial.unhealthy": ErrorSpec("The model failed its trial.", "The last known good is back in service."),
    "trial.crashed": ErrorSpec(
        "The engine died during the trial.", "The last known good is back in service."
    ),
    "trial.over_memory": ErrorSpec(
        "The engine outgrew its memory while the model was in service.",
        "The last known good is back in service; see whether the model, or its driver, leaks.",
    ),
    "trial.superseded": ErrorSpec("Another version is wanted now.", "Nothing to do."),
    "rollback.impossible": ErrorSpec("No last known good is left to go back to.", "Roll out a good version."),
    # --- identity and access
    "auth.missing": ErrorSpec("No credentials.", "Send an API token, or a client certificate."),
    "auth.invalid": ErrorSpec("The credentials are not valid.", "Ask an administrator for new ones."),
    "auth.forbidden": ErrorSpec("This role may not do that.", "Ask for a role that may."),
    "enrol.token_invalid": ErrorSpec("The join token is not known.", "Make a new one."),
    "enrol.token_used": ErrorSpec("The join token has no uses left.", "Make a new one."),
    "enrol.token_expired": ErrorSpec("The join token has expired.", "Make a new one."),
    "enrol.csr_invalid": ErrorSpec(
        "The signing request is not valid.", "Send a P-256 request signed by its key."
    ),
    "enrol.server_not_trusted": ErrorSpec(
        "The server is not the one that the join token names.",
        "Check the address; somebody may be in between.",
    ),
    "identity.revoked": ErrorSpec("The device's certificate is revoked.", "Enrol the device again."),
    # --- API
    "request.invalid": ErrorSpec("The request is not valid.", "Correct the field that the path names."),
    "request.conflict": ErrorSpec("This cannot be done in the present state.", "See the detail."),
    "request.not_found": ErrorSpec("There is no such thing.", "Check the name."),
    "request.too_large": ErrorSpec("The request is larger than its limit.", "Send less at once."),
    "request.rate_limited": ErrorSpec("Too many requests.", "Wait and try again.", retryable=True),
    # --- serving on the device
    "serve.bad_request": ErrorSpec(
        "The inference request is not valid.", "Correct the field that the message names."
    ),
    "serve.unknown_model": ErrorSpec(
        "No such model or version is served.", "See the repository's index for what there is."
    ),
    "serve.not_ready": ErrorSpec(
        "The model is not loaded.", "See the reason in the message and in the repository's index."
    ),
    "serve.not_found": ErrorSpec("There is no such region.", "Register it first."),
    "serve.conflict": ErrorSpec("This cannot be done in the present state.", "See the detail."),
    "serve.unsupported": ErrorSpec("This server cannot do that.", "See the detail."),
    "serve.unsupported_encoding": ErrorSpec(
        "The body's encoding is not known here.", "Send it plain, in gzip or in deflate."
    ),
    "serve.too_large": ErrorSpec("The request is larger than its limit.", "Send less at once."),
    "serve.overloaded": ErrorSpec(
        "More is asked for than can be answered in time.", "Wait and try again.", retryable=True
    ),
    "serve.rate_limited": ErrorSpec(
        "The client, or all clients together, ask more often than was agreed.",
        "Ask less often; the answer says when the next request is taken.",
        retryable=True,
    ),
    "serve.timeout": ErrorSpec(
        "The answer was not ready in time.", "Ask for less, or allow more time.", retryable=True
    ),
    "serve.model_lost": ErrorSpec("A run of the model hangs.", "Load the model again."),
    "serve.broker_failed": ErrorSpec(
        "The broker of the plant that requests come by cannot be used.",
        "Check [serve.mqtt] in agent.toml, and that the broker runs.",
        retryable=True,
    ),
    "serve.state_unwritable": ErrorSpec(
        "What was learned from rewards is not on the disk; it holds until the end of the process.",
        "Make the model directory writable for the server, and see that its disk is not full.",
    ),
    "serve.repository_unreadable": ErrorSpec(
        "The model directory cannot be read as one.", "Correct what the message names."
    ),
    # --- the control plane's own machine
    "server.unreachable": ErrorSpec(
        "The control plane cannot be reached.",
        "Check the address (--server, PITHEAD_SERVER or cli.toml), and that `pithead serve` runs there.",
        retryable=True,
    ),
    "server.unavailable": ErrorSpec(
        "The control plane's database cannot be used now.",
        "Wait and try again; an administrator finds the reason in the server's log.",
        retryable=True,
    ),
    "server.disk_full": ErrorSpec(
        "The control plane's disk is full.", "Free some space on the server.", retryable=True
    ),
    # --- registry
    "release.exists": ErrorSpec(
        "This version is published already.", "A version never changes; use a new one."
    ),
    "release.signature_invalid": ErrorSpec(
        "The release is not signed by a release key.", "Sign it with a key of the release role."
    ),
    "release.counter_not_rising": ErrorSpec(
        "The release counter does not rise.", "Use a counter above the newest release of the model."
    ),
    "release.not_admitted": ErrorSpec("The package failed its validation.", "See the detail."),
    # --- signing
    "signing.refused": ErrorSpec(
        "The signer does not sign this.", "Online keys sign metadata of their own roles only."
    ),
    "signing.unavailable": ErrorSpec(
        "The signer cannot be reached.", "Start it again; see its log.", retryable=True
    ),
    # --- rollouts
    "rollout.policy_invalid": ErrorSpec("The policy is not valid.", "Correct the field that the path names."),
    "rollout.trace_invalid": ErrorSpec("The trace is not valid.", "Correct the line that the message names."),
    "rollout.illegal_transition": ErrorSpec(
        "The rollout is not in a state that allows this.", "See its state."
    ),
    "rollout.overlap": ErrorSpec(
        "Another rollout of this model runs on some of these devices.", "End it or choose other devices."
    ),
    "rollout.no_devices": ErrorSpec("No device matches.", "Check the group's labels."),
    # --- this machine
    "storage.full": ErrorSpec("The device's disk is full.", "Free some space.", retryable=True),
    "storage.failed": ErrorSpec(
        "The device's disk cannot be read or written.", "Check the disk and the rights of the agent."
    ),
    "storage.corrupt": ErrorSpec(
        "A file of the device's state cannot be read.", "It was put aside; the device went on without it."
    ),
    "config.invalid": ErrorSpec("A setting is not valid.", "Correct the setting that the message names."),
    "source.failed": ErrorSpec(
        "A sensor source failed.", "Check the sensor and its settings.", retryable=True
    ),
    "source.plugin_broken": ErrorSpec(
        "A third party's sensor source cannot be used.",
        "Update or remove the distribution that the message names.",
    ),
    "sink.failed": ErrorSpec(
        "A sink of a lane failed; the lane goes on.",
        "Check the other side and the sink's settings; it is tried again by itself.",
        retryable=True,
    ),
    "sink.plugin_broken": ErrorSpec(
        "A third party's sink cannot be used.",
        "Update or remove the distribution that the message names.",
    ),
    "internal.error": ErrorSpec("Something unexpected failed.", "See the log; please report it."),
}


class PitheadError(Exception):
    """An error with a stable code from ``ERRORS`` and its facts.

    Raises ``KeyError`` at once when the code is not in the table, so that no
    code can exist that the documentation does not know.
    """

    def __init__(self, code: str, detail: str = "", **facts: object) -> None:
        self.spec = ERRORS[code]
        self.code = code
        self.detail = detail.replace("\0", "\\0")  # foreign words; no database and no message takes a NUL
        self.facts = facts
        super().__init__(f"{code}: {self.detail or self.spec.summary}")

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later without any change."""
        return self.spec.retryable

    @property
    def remedy(self) -> str:
        """What to do next, for a person."""
        return self.spec.remedy
