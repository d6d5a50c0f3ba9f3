"""Imported first by a fork server: what it imports then does not come from the current folder.

Some Pythons (3.10, 3.11, before 3.12.8 and 3.13.1) start the server with ``-c`` and do not tell it the command's
``sys.path`` (CPython issue 117378), so the current folder stands in front: a clone of nnU-Net there, or a file with the
name of a standard module. Workers get the command's ``sys.path`` in any case.
"""

import sys

sys.path[:] = [entry for entry in sys.path if entry]
