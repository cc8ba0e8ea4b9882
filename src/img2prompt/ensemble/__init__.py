"""The members' mix (eq. 6) and its weights."""
