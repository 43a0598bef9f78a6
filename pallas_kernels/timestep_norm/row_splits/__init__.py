"""TimestepNorm with rows split in time: all that GPU backends share."""
