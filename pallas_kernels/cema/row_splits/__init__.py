"""CEMA by the recurrence in registers, rows split in time: all that GPU backends share."""
