"""Records: local files and Hub datasets of every recorded shape behind one `load`. Imports nothing heavy."""

from rlhf_cli.data.loading import fingerprint, load
from rlhf_cli.data.record import Record, as_demonstrations, check_lengths, check_references, counts
from rlhf_cli.data.spec import gives

__all__ = ["Record", "as_demonstrations", "check_lengths", "check_references", "counts", "fingerprint", "gives", "load"]
