"""What has come back for one request besides its tokens (nmoe/outputs.py), in step with them.

Invariants: after each delivery there is one record for each of the stream's tokens and none for tokens after a stop
string; every cell is handed out once, by `take_cells`, to a caller who releases it.
"""

import array

from nmoe.outputs import Returns, unpack


class Outputs:
    """The outputs of one stream. Records and routing stay bytes until they are rendered."""

    def __init__(self, returns: Returns, prompt_len: int) -> None:
        self.returns = returns
        self.prompt = bytearray()  # records of the prompt's tokens except the first, if requested
        self.routing = bytearray()  # of all computed positions
        self._prompt_size = (prompt_len - 1) * returns.record_bytes if returns.prompt else 0
        self._records = bytearray()  # of the output's tokens, from the first one not taken
        self._num_taken = 0  # records
        self._cells = array.array("i")
        self._num_cells = 0  # taken

    def add(self, data: memoryview) -> None:
        """Add a block. Raises ValueError if it is not one that `returns` produces."""
        block = unpack(data, self.returns)
        missing = self._prompt_size - len(self.prompt)
        self.prompt += block.records[:missing]
        self._records += block.records[missing:]
        self.routing += block.routing
        self._cells.frombytes(block.cells.cast("b"))

    def end(self, num_tokens: int) -> "array.array[int]":
        """End the output after `num_tokens` tokens, dropping later records. Returns the cells nobody will take."""
        size = self.returns.record_bytes
        del self._records[(num_tokens - self._num_taken) * size :]
        if not self._cells:
            return array.array("i")
        kept = self._prompt_size // size + num_tokens - self._num_cells
        dropped = self._cells[kept:]
        del self._cells[kept:]
        return dropped

    def take(self) -> bytes:
        """The records of output tokens since the last call."""
        taken = bytes(self._records)
        self._num_taken += len(taken) // self.returns.record_bytes
        self._records.clear()
        return taken

    @property
    def num_prompt_records(self) -> int:
        """How many records the prompt's tokens have, including those still to come."""
        return self._prompt_size // self.returns.record_bytes

    @property
    def num_untaken_cells(self) -> int:
        """How many cells the next call of `take_cells` can return."""
        return len(self._cells)

    def take_cells(self, most: int | None = None) -> "array.array[int]":
        """The next cells, at most `most`, each with the logits of one record, those of the prompt first;
        the caller must release them."""
        cells = self._cells[:most]
        self._num_cells += len(cells)
        del self._cells[: len(cells)]
        return cells
