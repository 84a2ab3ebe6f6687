/* An external TFLite delegate for the tests: it runs dense layers of floats, by plain loops.
 *
 * It goes through the runtime's own loading path, as a vendor's driver does, and can be told to
 * behave as one of them may: options
 *   take=N     take at most N nodes (default: all that it can)
 *   slow_us=N  take so long for a run
 *   gain=X     multiply its results, as a driver that computes something else
 *   fail=TEXT  do not start, and say TEXT
 *   crash=N    die at the Nth run, by abort
 *   fault=N    write where there is nothing at the Nth run
 *   hang=N     do not come back from the Nth run
 *   leak_kb=N  keep so much of each run
 *
 * Structures: as far as needed, in the layout of TensorFlow Lite's core/c/common.h.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef enum { OK = 0, ERROR = 1 } Status;
enum { FLOAT32 = 1, FULLY_CONNECTED = 9, RELU = 1, DELEGATE = 51, MOST = 64 };

typedef struct {
    int size;
    int data[];
} Ints;

typedef struct {
    int type;
    void *data;
    Ints *dims;
    float scale;
    int32_t zero_point;
    int allocation_type;
    size_t bytes;
    const void *allocation;
    const char *name;
    void *delegate;
    int buffer_handle;
    bool data_is_stale, is_variable;
    int quantization_type;
    void *quantization;
    void *sparsity;
    const Ints *dims_signature;
} Tensor;

typedef struct {
    Ints *inputs, *outputs, *intermediates, *temporaries;
    void *user_data, *builtin_data;
    const void *custom_initial_data;
    int custom_initial_data_size;
    void *delegate;
    bool might_have_side_effect;
} Node;

typedef struct Context Context;

typedef struct {
    void *(*init)(Context *, const char *, size_t);
    void (*free)(Context *, void *);
    Status (*prepare)(Context *, Node *);
    Status (*invoke)(Context *, Node *);
    const char *(*profiling_string)(const Context *, const Node *);
    int32_t builtin_code;
    const char *custom_name;
    int version;
    void *registration_external;
    void *(*async_kernel)(Context *, Node *);
    uint64_t inplace_operator;
} Registration;

typedef struct Delegate {
    void *data;
    Status (*Prepare)(Context *, struct Delegate *);
    void *copy_from, *copy_to, *free_handle;
    int64_t flags;
    void *opaque;
} Delegate;

struct Context {
    size_t tensors_size;
    Status (*GetExecutionPlan)(Context *, Ints **);
    Tensor *tensors;
    void *impl;
    void *resize_tensor;
    void (*ReportError)(Context *, const char *, ...);
    void *add_tensors;
    Status (*GetNodeAndRegistration)(Context *, int, Node **, Registration **);
    Status (*ReplaceNodeSubsetsWithDelegateKernels)(Context *, Registration, const Ints *, Delegate *);
};

typedef struct {
    Delegate *delegate;
    Ints *nodes_to_replace, *input_tensors, *output_tensors;
} Params;

typedef struct {
    int take, slow_us, crash, fault, hang, leak_kb, runs;
    float gain;
} Settings;

typedef struct {
    int input, weights, bias, output;
    bool relu;
} Layer;

typedef struct {
    Settings *settings;
    int count;
    Layer layers[MOST];
    float *between[MOST]; /* results that no other node reads: the runtime has no room for them */
} Kernel;

static bool fits(Context *context, const Node *node, const Registration *registration) {
    if (registration->builtin_code != FULLY_CONNECTED || node->inputs->size != 3) return false;
    for (int i = 0; i < 3; i++) {
        int at = node->inputs->data[i];
        if (at < 0 || context->tensors[at].type != FLOAT32) return false;
    }
    return true;
}

static void *kernel_init(Context *context, const char *buffer, size_t length) {
    const Params *params = (const Params *)buffer;
    Kernel *kernel = calloc(1, sizeof *kernel);
    (void)length;
    kernel->settings = params->delegate->data;
    for (int i = 0; i < params->nodes_to_replace->size && i < MOST; i++) {
        Node *node;
        Registration *registration;
        context->GetNodeAndRegistration(context, params->nodes_to_replace->data[i], &node, &registration);
        kernel->layers[kernel->count++] = (Layer){
            node->inputs->data[0], node->inputs->data[1], node->inputs->data[2],
            node->outputs->data[0], *(const int *)node->builtin_data == RELU,
        };
    }
    return kernel;
}

static void kernel_free(Context *context, void *data) {
    Kernel *kernel = data;
    (void)context;
    for (int i = 0; i < kernel->count; i++) free(kernel->between[i]);
    free(kernel);
}

static Status kernel_prepare(Context *context, Node *node) {
    (void)context;
    (void)node;
    return OK;
}

static Status kernel_invoke(Context *context, Node *node) {
    Kernel *kernel = node->user_data;
    Settings *settings = kernel->settings;
    const float *x = context->tensors[kernel->layers[0].input].data;
    int run = ++settings->runs;
    if (run == settings->crash) abort();
    if (run == settings->fault) *(volatile int *)NULL = 0;
    if (run == settings->hang)
        for (;;) pause();
    if (settings->leak_kb) memset(malloc(settings->leak_kb * 1024L), run, settings->leak_kb * 1024L);
    if (settings->slow_us) usleep(settings->slow_us);
    for (int i = 0; i < kernel->count; i++) {
        const Layer *layer = &kernel->layers[i];
        const Tensor *weights = &context->tensors[layer->weights], *result = &context->tensors[layer->output];
        const float *w = weights->data, *b = context->tensors[layer->bias].data;
        int out = weights->dims->data[0], in = weights->dims->data[1];
        size_t rows = result->dims->data[0];
        float *y = result->data;
        if (y == NULL) y = kernel->between[i] = realloc(kernel->between[i], rows * out * sizeof *y);
        for (size_t row = 0; row < rows; row++)
            for (int o = 0; o < out; o++) {
                float sum = b[o];
                for (int k = 0; k < in; k++) sum += x[row * in + k] * w[o * in + k];
                if (layer->relu && sum < 0) sum = 0;
                y[row * out + o] = sum * settings->gain;
            }
        x = y;
    }
    return OK;
}

static Status prepare(Context *context, Delegate *delegate) {
    const Settings *settings = delegate->data;
    Registration kernel = {
        kernel_init, kernel_free, kernel_prepare, kernel_invoke, NULL, DELEGATE, "dense", 1, NULL, NULL, 0,
    };
    Ints *plan, *taken;
    Status status = context->GetExecutionPlan(context, &plan);
    if (status != OK) return status;
    taken = malloc(sizeof *taken + plan->size * sizeof(int));
    taken->size = 0;
    for (int i = 0; i < plan->size && taken->size < settings->take; i++) {
        Node *node;
        Registration *registration;
        if (context->GetNodeAndRegistration(context, plan->data[i], &node, &registration) != OK) break;
        if (fits(context, node, registration)) taken->data[taken->size++] = plan->data[i];
    }
    if (taken->size)
        status = context->ReplaceNodeSubsetsWithDelegateKernels(context, kernel, taken, delegate);
    free(taken);
    return status;
}

Delegate *tflite_plugin_create_delegate(
    const char *const *keys, const char *const *values, size_t count, void (*report)(const char *)) {
    Settings *settings = malloc(sizeof *settings);
    *settings = (Settings){.take = MOST, .gain = 1.0f};
    for (size_t i = 0; i < count; i++) {
        if (!strcmp(keys[i], "take")) settings->take = atoi(values[i]);
        else if (!strcmp(keys[i], "slow_us")) settings->slow_us = atoi(values[i]);
        else if (!strcmp(keys[i], "gain")) settings->gain = strtof(values[i], NULL);
        else if (!strcmp(keys[i], "crash")) settings->crash = atoi(values[i]);
        else if (!strcmp(keys[i], "fault")) settings->fault = atoi(values[i]);
        else if (!strcmp(keys[i], "hang")) settings->hang = atoi(values[i]);
        else if (!strcmp(keys[i], "leak_kb")) settings->leak_kb = atoi(values[i]);
        else {
            report(strcmp(keys[i], "fail") ? "an option is not known" : values[i]);
            free(settings);
            return NULL;
        }
    }
    Delegate *delegate = calloc(1, sizeof *delegate);
    delegate->data = settings;
    delegate->Prepare = prepare;
    return delegate;
}

void tflite_plugin_destroy_delegate(Delegate *delegate) {
    free(delegate->data);
    free(delegate);
}
