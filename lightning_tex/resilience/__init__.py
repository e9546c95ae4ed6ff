"""What keeps a run trustworthy: ranks that agree, signals that lose nothing, failures that are named."""
