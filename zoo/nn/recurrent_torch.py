"""torch's recurrent nets and cells with `dtype` and `param_dtype`, and lengths for packing.

T steps of B sequences, F features in, H hidden units, L layers, D directions (1 or 2). In
time-major order sequences are (T, B, F); with `batch_first` they are (B, T, F), and states stay
(L*D, B, H).
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from zoo.nn.layers_torch import promote
from zoo.nn.options_torch import Options

State = tuple[Tensor, ...]


class RecurrentOptions(Options, total=False):
    """What RNN, GRU and LSTM take besides their sizes."""

    batch_first: bool
    dropout: float  # on the outputs of every layer but the last, in training
    bidirectional: bool


class _Recurrent(nn.RNNBase):
    """What the three nets share: casting, lengths, and the call of torch's own kernels."""

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            mode,
            input_size,
            hidden_size,
            num_layers,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            dtype=param_dtype,
        )
        self.dtype = dtype

    def _run(
        self, kernel: Any, input: Tensor, states: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """`kernel` is torch.lstm, torch.gru, ...; `states` is one tensor, for the LSTM two.

        The kernel is called directly: nn.RNNBase.forward takes no weights that were cast to another
        dtype.
        """
        parameters = [getattr(self, name) for name in self._flat_weights_names]
        given = list(states or ())
        input, *rest = promote(self.dtype, input, *parameters, *given)
        weights, given = rest[: len(parameters)], rest[len(parameters) :]
        batch = input.shape[0 if self.batch_first else 1]
        if not given:
            shape = (self.num_layers * (1 + self.bidirectional), batch, self.hidden_size)
            given = [input.new_zeros(shape) for _ in range(2 if self.mode == "LSTM" else 1)]
        has_biases = True
        options = (has_biases, self.num_layers, self.dropout, self.training, self.bidirectional)
        if lengths is None:
            hx = given if self.mode == "LSTM" else given[0]
            output, *final = kernel(input, hx, weights, *options, self.batch_first)
            return output, tuple(final)
        # The packed kernel takes the longest sequence first: sort the states too, and sort back.
        packed = pack_padded_sequence(input, lengths.cpu(), self.batch_first, enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        assert order is not None
        assert back is not None
        given = [s.index_select(1, order) for s in given]
        hx = given if self.mode == "LSTM" else given[0]
        data, *final = kernel(packed.data, packed.batch_sizes, hx, weights, *options)
        result = PackedSequence(data, packed.batch_sizes, order, back)
        steps = input.shape[1 if self.batch_first else 0]
        output, _ = pad_packed_sequence(result, self.batch_first, total_length=steps)
        return output, tuple(s.index_select(1, back) for s in final)


class RNN(_Recurrent):
    """nn.RNN: h = tanh(W_ih x + b_ih + W_hh h + b_hh), or ReLU."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        **kw: Unpack[RecurrentOptions],
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity {nonlinearity!r} is neither tanh nor relu")
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(mode, input_size, hidden_size, num_layers, **kw)
        self.nonlinearity = nonlinearity

    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sequences, first state (L*D, B, H) -> outputs with D*H features, final state.

        `hx` None is zeros. `lengths` (B,), integers from 1 to T, end each sequence early: outputs
        after its last step are zero, the final state is that of its last step, and the reverse
        direction starts there.
        """
        kernel = torch.rnn_relu if self.nonlinearity == "relu" else torch.rnn_tanh
        output, (h,) = self._run(kernel, input, None if hx is None else (hx,), lengths)
        return output, h


class GRU(_Recurrent):
    """nn.GRU. Gates r, z, n; the hidden part of n, its bias included, is scaled by r."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        **kw: Unpack[RecurrentOptions],
    ) -> None:
        super().__init__("GRU", input_size, hidden_size, num_layers, **kw)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As RNN.forward."""
        output, (h,) = self._run(torch.gru, input, None if hx is None else (hx,), lengths)
        return output, h


class LSTM(_Recurrent):
    """nn.LSTM. Gates i, f, g, o."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        **kw: Unpack[RecurrentOptions],
    ) -> None:
        super().__init__("LSTM", input_size, hidden_size, num_layers, **kw)

    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As RNN.forward; states are pairs (h, c)."""
        output, (h, c) = self._run(torch.lstm, input, hx, lengths)
        return output, (h, c)


class RNNCell(nn.RNNCell):
    """nn.RNNCell: one step. Parameters weight_ih, weight_hh, bias_ih, bias_hh."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        nonlinearity: str = "tanh",
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity {nonlinearity!r} is neither tanh nor relu")
        super().__init__(input_size, hidden_size, nonlinearity=nonlinearity, dtype=param_dtype)
        self.dtype = dtype

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, F), state (B, H), zeros if None -> next state (B, H)."""
        if hx is None:
            hx = input.new_zeros(input.shape[0], self.hidden_size)
        kernel = torch.rnn_relu_cell if self.nonlinearity == "relu" else torch.rnn_tanh_cell
        return kernel(*promote(self.dtype, input, hx, *_cell_weights(self)))


class GRUCell(nn.GRUCell):
    """nn.GRUCell: one step. Parameters weight_ih, weight_hh, bias_ih, bias_hh."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(input_size, hidden_size, dtype=param_dtype)
        self.dtype = dtype

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, F), state (B, H), zeros if None -> next state (B, H)."""
        if hx is None:
            hx = input.new_zeros(input.shape[0], self.hidden_size)
        return torch.gru_cell(*promote(self.dtype, input, hx, *_cell_weights(self)))


class LSTMCell(nn.LSTMCell):
    """nn.LSTMCell: one step. Parameters weight_ih, weight_hh, bias_ih, bias_hh."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(input_size, hidden_size, dtype=param_dtype)
        self.dtype = dtype

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """input (B, F), (h, c) both (B, H), zeros if None -> next (h, c)."""
        if hx is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            hx = (zeros, zeros)
        x, h, c, *weights = promote(self.dtype, input, *hx, *_cell_weights(self))
        return torch.lstm_cell(x, (h, c), *weights)


def _cell_weights(cell: nn.RNNCellBase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
