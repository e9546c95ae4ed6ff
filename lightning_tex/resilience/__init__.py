"""What keeps a run of many ranks honest: what they must have alike is compared, and what differs is named."""
