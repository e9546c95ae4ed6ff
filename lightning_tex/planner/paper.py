"""placeholder"""
def reproduce(): return {}
