"""Auditory attention: which talker a listener attends to, from recordings of the brain."""
