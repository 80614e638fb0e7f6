"""The wire protocol, pure: messages, slot pools, and the sender and receiver state machines."""
