"""The prompt cache on disk: prompts that were read once survive the backend's process.

`mlx_lm.server` keeps the keys and values of earlier prompts in memory, so a swap, an unload or a
restart throws them away, and an agent's next request is read again from its first token.
`cache.py` writes them to files when nothing else is to be done and when the process is asked to
exit, and finds them again by their tokens. The other modules know nothing of mlx-lm:

===================  ===============================================================================
``entry.py``         the format of a file
``index.py``         finds the entry that has the longest beginning in common with a prompt
``store.py``         the folder of all entries: what is written, found, evicted, swept
``fingerprint.py``   the name of a model's folder, from everything that its entries depend on
===================  ===============================================================================
"""
