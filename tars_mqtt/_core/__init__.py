"""The engine behind both clients. What of it is public, `tars_mqtt` exports."""
