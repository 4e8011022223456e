"""Names, places and content of files: no file is lost or half written, and nothing that is read is trusted unchecked.

| module | what it does |
|---|---|
| `file_names` | names that users give, as paths that work on every system |
| `places`, `lock`, `atomic` | whether a file can be written; one writer at a time; whole or not at all |
| `fields` | checks of plain data from a file, stated as a schema |
| `tensor_files` | safetensors and torch files of others |
| `sentences` | values and errors as parts of a sentence |
"""

from .atomic import remove_parts, write_atomically, write_error
from .file_names import name_problem, relative_path
from .lock import Lock
from .places import InUse, PlaceError, Taken, check_place, same_place
from .sentences import first_line, short_repr
from .tensor_files import check_tensors, read_pickled, read_safetensors

__all__ = [
    "InUse", "Lock", "PlaceError", "Taken", "check_place", "check_tensors", "first_line", "name_problem", "read_pickled",
    "read_safetensors", "relative_path", "remove_parts", "same_place", "short_repr", "write_atomically", "write_error"]
