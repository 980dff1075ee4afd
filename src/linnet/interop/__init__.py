"""Bridges to other frameworks; each module needs the extra it names, and nothing else in linnet imports them."""
