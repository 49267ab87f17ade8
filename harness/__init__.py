"""Measures what each architecture costs and loses as the sequence grows."""
