"""From MQTT to the database: receive, check, store in batches, acknowledge."""
