"""What keeps a run of many processes honest when one of them fails: who failed first, who stalls, and that all end.

Knows no Lightning.
"""
