"""The closed list of causes: what each word means, how it is said, and what to try.

`Divergence.cause` is one of these words; docs/faults.md lists them. A cause is said in one or more
variants, each a sentence and an advice with fields for the values that fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """A cause that fits."""

    cause: str  # a word of CAUSES
    diagnosis: str  # a sentence with the values that fit
    advice: str  # what to try
    tensor: str | None = None  # the parameter at fault


@dataclass(frozen=True, slots=True)
class Cause:
    """What a word means, and its variants: name -> (sentence, advice), as str.format takes them."""

    meaning: str
    variants: Mapping[str, tuple[str, str]]
    # The kind of layer that is at fault where torch has one for it and Flax a function.
    layer: str | None = None


def found(
    cause: str, variant: str = "", /, *, tensor: str | None = None, **values: object
) -> Reason:
    """A reason by a cause of the list; KeyError for one that is not on it, or for a value
    that its variant needs and does not get. `tensor` is the parameter at fault."""
    sentence, advice = CAUSES[cause].variants[variant]
    return Reason(cause, sentence.format(**values), advice.format(**values), tensor)


def repaired(cause: str, /, *, expression: str, place: str | None, said: str) -> Reason:
    """A reason that was found by changing torch's own computation until it gave Flax's values."""
    if cause not in CAUSES:
        raise KeyError(cause)
    where = f" ({place})" if place else ""
    return Reason(cause, f"torch computes `{expression}`{where}; Flax's values fit {said}",
                  "compare Flax's code with this expression")  # fmt: skip


_ONE_RUN = "see whether the two are of one training run, and the tensor's place in the layout"
_SAME_SIZES = "compare sizes, strides and padding"
_LINE_BY_LINE = "compare the two, line by line"
_HEADS_FIRST = "split features into (heads, head_dim), heads first"
_BIASED = "divide by sqrt(variance + epsilon), where the variance is the sum of squares over n"
_CORRELATE = "neither framework's convolution flips its kernel: do not flip it in the conversion"
_TWO_BIASES = "keep both of torch's biases, or add them up where the cell has only one"
_RECURRENCE = "compute the recurrence as torch documents it"
_OTHER_ROPE = "rotate in the same style, or permute the rows of query and key"
_CHANNELS_FIRST = "transpose to channel first before flattening, or reorder the kernel's rows"
_DETACH = "use jax.lax.stop_gradient where torch has detach"
_MOMENTUM = "momentum={kept:g} in Flax, where it is the share of the old value"
_UNBIASED = "multiply the batch's variance by n / (n - 1) before it is averaged in"
_SHARES = "{name} takes {flax:.4g} of the batch in Flax, {torch:.4g} in torch"
_TOWARDS = "{name} moves towards the biased variance in Flax; torch's is over n - 1 = {count}"

# fmt: off
CAUSES: Mapping[str, Cause] = {
    # --- Values of a tensor: {name} is the tensor's ---
    "transposed": Cause("the axes of a tensor, or of a value, are in another order", {
        "matrix": ("{name} is transposed", "permute its axes as the layout says"),
        "square matrix": ("{name} is transposed, which its square shape hides",
                          "permute its axes as the layout says"),
        "tensor": ("{name} has its axes in the order {axes}",
                   "permute its axes as the layout says"),
        "kernel": ("Flax multiplies by the transposed kernel",
                   "torch's weight is (out, in), Flax's kernel (in, out): transpose it once"),
        "image": ("Flax's kernel has its height and width swapped",
                  "permute (out, in, h, w) to (h, w, in, out)"),
        "channels": ("Flax's kernel has its input and output channels swapped",
                     "permute (out, in, ...) to (..., in, out)"),
        "value": ("axes {a} and {b} are swapped in Flax", "permute the axes in Flax"),
    }),
    "flipped": Cause("a kernel or tensor is back to front along some axes", {
        "tensor": ("{name} is flipped along {axes}", "flip it back, or do not flip it at all"),
        "convolution": ("Flax's kernel is flipped along its spatial axes", _CORRELATE),
        "transposed convolution": (
            "Flax's kernel is not flipped, as torch's transposed convolution needs it",
            "transpose_kernel=True in Flax, or flip the kernel's spatial axes"),
    }),
    "flatten": Cause("an image is flattened channel last on one side, channel first on the other", {
        "tensor": ("{name} has its {size} inputs, {channels} channels of {pixels} pixels, "
                   "flattened pixels before channels, not channels before pixels",
                   "torch flattens images channel first, Flax channel last: reorder the rows"),
        "value": ("torch flattens {name}, {channels} channels of {pixels} pixels, channel first, "
                  "Flax channel last", _CHANNELS_FIRST),
        "layer": ("torch's layer {name} flattens channel first, Flax channel last",
                  _CHANNELS_FIRST),
    }, layer="flatten"),
    "heads": Cause("attention heads: another number, or head_dim before heads", {
        "tensor": ("{name} has the {heads} heads of {width} features along axis {axis} with "
                   "head_dim before heads, not heads before head_dim", _HEADS_FIRST),
        "axes": ("{name} has heads and head_dim swapped: its axes are in the order {axes}",
                 _HEADS_FIRST),
        "split": ("torch splits {size} features into {heads} heads of {width}, heads before "
                  "head_dim, Flax head_dim before heads", _HEADS_FIRST),
        "value": ("torch has the {heads} heads of {width} in the last axis heads before head_dim, "
                  "Flax head_dim before heads", _HEADS_FIRST),
        "number": ("torch has {torch} heads, Flax's values fit {flax}",
                   "use {torch} heads in Flax"),
    }),
    "blocks": Cause("query, key and value, or halves, joined in another order", {
        "": ("{name} has its blocks along axis {axis} in the order {flax}, not {torch}",
             "reorder the blocks to {torch}"),
        "halves": ("{name} has the two halves of axis {axis} swapped",
                   "join the two in torch's order"),
    }),
    "gates": Cause("the gates of a recurrent cell in another order", {
        "tensor": ("{name} has its gates along axis {axis} in the order {flax}, not {torch}",
                   "reorder the blocks to {torch}"),
        "code": ("torch's gates are {torch}; Flax takes them for {flax}",
                 "reorder the gates' blocks to {torch}"),
    }),
    "rope": Cause("rotary positions (RoPE) of the other style, or none", {
        "interleaved": ("{name} has the rows of its {heads} heads interleaved, not in halves: "
                        "they are laid out for the other style of RoPE", _OTHER_ROPE),
        "in halves": ("{name} has the rows of its {heads} heads in halves, not interleaved: "
                      "they are laid out for the other style of RoPE", _OTHER_ROPE),
        "code": ("torch rotates {torch}, Flax {flax} (RoPE)", _OTHER_ROPE),
    }),
    "swapped": Cause("two tensors or arguments stand in one another's place", {
        "": ("{name} holds the values of {other}", "swap it with {other}"),
        "transposed": ("{name} holds the values of {other}, transposed",
                       "swap it with {other}, and transpose it"),
        "arguments": ("{names} are swapped in Flax's attention",
                      "pass query, key and value in their order"),
    }),
    "permuted": Cause("the right elements in an order that no known mistake makes", {
        "slices": ("{name} has the right slices along axis {axis}, in another order",
                   "see in which order each side puts that axis together"),
        "": ("{name} has the right elements in other places", "reorder it as the layout says"),
    }),
    "tied": Cause("torch shares one tensor between two layers, Flax does not", {
        "": ("torch ties {name} to {other}; Flax's {flax} holds other values",
             "share the tensor of {other}"),
        "copies": ("torch's {name} is one tensor with {other}; Flax has copies of it, {flax}, "
                   "each with its own part of the gradient", "share one variable"),
    }),
    "default": Cause("a tensor that was not loaded", {
        "": ("{name} holds only {value}, as in a freshly made layer: it was not loaded", "load it"),
        "constant": ("{name} holds only {value:g}: it was not loaded", "load it"),
    }),
    "values": Cause("a tensor holds other values, in no way that is known", {
        "": ("{name}: {count} of {size} values of Flax's {flax} are not torch's",
             "load it from torch again"),
        "copied": ("{name} holds the values of {other}, which has them too", "load its own"),
    }),
    "weights": Cause("a tensor of two checkpoints differs", {
        "": ("{name} differs in {why}", _ONE_RUN),
        "explained": ("{name} differs in {why}; {reason}", _ONE_RUN),
    }),

    # --- Biases ---
    "bias_missing": Cause("a bias is left out, or zero", {
        "tensor": ("{name} holds only zeros in Flax", "load it"),
        "": ("Flax leaves out the bias", "add the bias once"),
        "recurrent": ("Flax leaves out {name}", _TWO_BIASES),
    }),
    "bias_twice": Cause("a bias is added twice", {
        "": ("Flax adds the bias twice", "add the bias once"),
        "recurrent": ("Flax adds {name} twice", _TWO_BIASES),
    }),
    "bias_negated": Cause("a bias is subtracted", {
        "": ("Flax subtracts the bias", "add the bias once"),
    }),
    "bias_order": Cause("the two biases of a recurrent layer are swapped", {
        "": ("bias_ih and bias_hh are swapped in Flax", _TWO_BIASES),
    }),
    "bias_sum": Cause("one bias holds the sum of two", {
        "": ("{name} holds the sum of itself and {other}", "keep the two apart"),
        "gates": ("{name} has {other} added to some of its {count} gates ({parts})",
                  "in a GRU the two biases of gate n must stay apart"),
        "trained": ("torch trains {name} and {other} apart, so that their sum moves twice as far "
                    "as the one bias that Flax has; with one of the two held fixed both train "
                    "alike", "keep both biases in Flax, where the two are to train alike"),
    }),

    # --- Recurrent cells ---
    "gru_bias": Cause("the hidden bias of a GRU's gate n is not inside r * (...)", {
        "summed": ("the two biases of gate n are added up on its {side} side; "
                   "torch's GRU scales one of them by r",
                   "keep bias_hh of gate n apart, inside r * (...)"),
        "": ("Flax leaves the hidden bias of gate n out of r * (...)", _RECURRENCE),
    }),
    "gru_reset": Cause("a GRU's reset gate acts before the product with the hidden weights", {
        "": ("Flax's reset gate acts on h before the product, torch's after it", _RECURRENCE),
    }),
    "gru_update": Cause("a GRU's update gate is the complement of torch's", {
        "": ("Flax's update gate weighs the new state, torch's the old one", _RECURRENCE),
    }),
    "forget_bias": Cause("an LSTM adds a constant to its forget gate", {
        "": ("Flax adds 1 to the forget gate", _RECURRENCE),
    }),

    # --- Normalisation ---
    "epsilon": Cause("the small number that a normalisation adds to the variance", {
        "": ("epsilon is {torch:g} in torch; Flax's values fit {flax:g}",
             "set epsilon={torch:g} in the Flax layer"),
        "after the root": ("Flax adds epsilon {epsilon:g} after the root, torch under it",
                           "divide by sqrt(variance + epsilon)"),
    }),
    "missing_scale": Cause("a normalisation without its scale", {
        "": ("Flax leaves out the scale", "use_scale=True in the Flax layer, and load it"),
    }),
    "missing_bias": Cause("a normalisation without its bias", {
        "": ("Flax leaves out the bias", "use_bias=True in the Flax layer, and load it"),
    }),
    "scale_plus_one": Cause("one side multiplies by 1 + scale, the other by the scale", {
        "plain": ("torch multiplies by 1 + its weight, Flax by the weight itself",
                  "multiply by 1 + scale in Flax, or load 1 + weight"),
        "smaller": ("{name} is smaller by one",
                    "one side multiplies by 1 + scale: store the scale that Flax's layer means"),
        "larger": ("{name} is larger by one",
                   "one side multiplies by 1 + scale: store the scale that Flax's layer means"),
        "code": ("Flax multiplies by 1 + scale, torch by its weight",
                 "store weight - 1 as the scale, or multiply by the scale itself"),
    }),
    "norm_kind": Cause("LayerNorm against RMSNorm", {
        "rms": ("Flax subtracts no mean (RMSNorm), torch does (LayerNorm)",
                "use the same normalisation on both sides"),
        "layer": ("Flax subtracts the mean (LayerNorm), torch does not",
                  "use the same normalisation on both sides"),
    }),
    "norm_order": Cause("normalisation before a layer on one side, after it on the other", {
        "": ("Flax calls {layer} before {other}, torch after it (norm first against norm last)",
             "normalise where torch does: norm_first is set on one side only"),
    }),
    "groups": Cause("the number of groups of a GroupNorm", {
        "": ("torch normalises in {torch} groups of channels, Flax in {flax}",
             "num_groups={torch} in Flax"),
    }),
    "fast_variance": Cause("Flax's E[x^2] - E[x]^2 loses digits where the mean is large", {
        "": ("Flax's fast variance E[x^2] - E[x]^2 loses digits: means are up to {worst:.3g} "
             "standard deviations from zero, and with centred inputs both agree",
             "use_fast_variance=False in the Flax layer"),
    }),
    "unbiased_variance": Cause("a variance over n - 1 against one over n", {
        "": ("Flax divides by the unbiased variance (n - 1 = {count}), torch by the biased one",
             _BIASED),
        "deviation": ("Flax divides by the unbiased standard deviation plus epsilon", _BIASED),
        "running": (_TOWARDS, _UNBIASED),
    }),
    "batch_statistics": Cause("BatchNorm in train mode on one side, in eval mode on the other", {
        "training": ("torch normalises by the batch's statistics, Flax by the running ones",
                     "use_running_average=False in Flax: both in one mode, train or eval"),
        "eval": ("torch normalises by the running statistics, Flax by the batch's",
                 "use_running_average=True in Flax: both in one mode, train or eval"),
        "still": ("{names} in Flax use running statistics also where the model is told to train",
                  "hand the model's switch on to them: use_running_average=not train"),
    }),
    "statistics": Cause("running statistics that do not move in training", {
        "": ("{name} does not move in Flax",
             "run Flax in train mode (Linen: with mutable=['batch_stats'])"),
    }),
    "momentum": Cause("another share of the batch in the running statistics", {
        "": (_SHARES, _MOMENTUM),
        "complement": (f"{_SHARES}: momentum is the complement", _MOMENTUM),
        "biased": (f"{_SHARES}; and {_TOWARDS}", _MOMENTUM),
        "complement, biased": (f"{_SHARES}: momentum is the complement; and {_TOWARDS}", _MOMENTUM),
    }),

    # --- Convolutions, pools, embeddings ---
    "padding": Cause("what a convolution puts around its input, or cuts off its output", {
        "": ("torch pads {torch}, Flax's values fit {word}, which is {flax} here",
             "padding={pads} in the Flax layer"),
        "mode": ("Flax pads with the image's own values ({mode}), torch with zeros",
                 "pad in the same way on both sides"),
        "transposed": ("Flax cuts {flax} off the full transposed convolution, torch {torch}",
                       "give Flax's ConvTranspose explicit padding (k - 1 - p on each side)"),
        "transposed, not flipped": (
            "Flax cuts {flax} off the full transposed convolution, torch {torch}, "
            "and its kernel is not flipped",
            "transpose_kernel=True and explicit padding (k - 1 - p on each side) in Flax's "
            "ConvTranspose"),
    }),
    "stride": Cause("the stride of a convolution", {
        "": ("stride is {torch} in torch; Flax's values fit {flax}",
             "the same stride on both sides"),
    }),
    "dilation": Cause("the dilation of a convolution", {
        "": ("dilation is {torch} in torch; Flax's values fit {flax}",
             "the same dilation on both sides"),
    }),
    "pooling": Cause("another pool, or its padding and rounding", {
        "": ("{where} torch has {torch}, Flax's values fit {flax}", "use {torch} in Flax"),
        "layer": ("torch has {torch} at {name}, Flax's values fit {flax}", "use {torch} in Flax"),
    }, layer="pool"),
    "offset": Cause("indices (token ids, positions) that count from another number", {
        "rows": ("Flax looks up row i{offset:+d} where torch looks up row i",
                 "count ids from the same number"),
        "": ("Flax's indices are torch's with {offset:+d} added", "count from the same number"),
    }),
    "padding_idx": Cause("the gradient of an embedding's row of padding", {
        "": ("row {row} gets a gradient in Flax; in torch it is padding_idx and gets none",
             "stop the gradient of looking up that row in Flax"),
        "only in Flax": ("row {row} gets no gradient in Flax, in torch it does",
                         "padding_idx={row} in torch too, or on neither side"),
    }),

    # --- Attention ---
    "mask": Cause("the mask of an attention or of weights: inverted, left out, too weak, another", {
        "missing": ("the mask is not applied in Flax", "apply it in Flax"),
        "inverted": ("the mask is inverted: Flax attends to what torch masks, and masks what "
                     "torch attends to", "negate the mask in Flax"),
        "weak": ("Flax adds {value:g} to masked logits, which does not mask them",
                 "add the most negative number of the dtype"),
        "gradient": ("torch masks {count} of the {size} numbers of {name} in every call; Flax "
                     "gives them a gradient", "apply the mask in Flax's __call__"),
        "gradient in Flax": ("Flax masks {count} of the {size} numbers of {name}; torch gives them "
                             "a gradient", "leave them unmasked in Flax"),
        "": ("torch uses {torch}, Flax's values fit {flax}", "use the same mask"),
    }),
    "causal": Cause("whether a step may attend to later ones", {
        "missing": ("the causal mask is not applied in Flax", "apply it in Flax"),
        "": ("Flax lets steps attend to later ones, torch does not",
             "apply the causal mask in Flax"),
        "added": ("Flax masks later steps too, torch does not", "drop the causal mask in Flax"),
    }),
    "softmax_axis": Cause("a softmax over another axis", {
        "attention": ("the softmax goes over the {axis} in Flax, over the keys in torch",
                      "axis=-1 in Flax"),
        "": ("the softmax of {name} goes over axis {torch} in torch, over axis {flax} in Flax",
             "axis={axis} in Flax"),
    }, layer="activation"),

    # --- The code between layers ---
    "gelu": Cause("GELU by erf, by tanh or by a sigmoid (quick)", {
        "": ("{where} torch has {torch}, Flax's values fit {flax}", "use {torch} in Flax"),
        "jax": ("{where} torch has {torch}, Flax's values fit {flax}",
                "jax.nn.gelu(x, approximate={approximate})"),
    }, layer="activation"),
    "activation": Cause("another activation", {
        "": ("{where} torch has {torch}, Flax's values fit {flax}", "use {torch} in Flax"),
        "gated": ("torch multiplies {a} of {x} by {b} of {y}, Flax {c} of {x} by {d} of {y}",
                  "swap the two, or their activations"),
        "recurrence": ("Flax's recurrence uses {flax}, torch's {torch}",
                       "the same nonlinearity on both sides"),
    }, layer="activation"),
    "missing_layer": Cause("a layer without parameters is left out", {
        "": ("Flax leaves out layer {name} ({type})", "add {type} in Flax"),
    }),
    "dropout": Cause("dropout is on", {
        "": ("dropout is on in Flax: {zeros:.0%} of the values are zero and the rest {factor:.4g} "
             "times larger, as p = {p:.3g} makes them",
             "deterministic=True, or model.eval(), in Flax"),
    }, layer="dropout"),
    "scale": Cause("a factor too many or too few", {
        "tensor": ("{name} is {factor} times what it should be", "load it without a factor"),
        "rounding": ("{name} differs from what it should be by rounding in float32 alone",
                     "load it without computing with it"),
        "": ("Flax's values are {factor} times torch's", "multiply by {inverse} in Flax"),
        "tiny": ("Flax's values are torch's times (1{difference:+.2g})",
                 "look for a constant that was rounded, or a factor close to one"),
        "logits": ("torch multiplies the logits by {torch}, Flax by {flax}",
                   "multiply the queries by {torch}"),
        "summand": ("torch multiplies {name} by {torch}, Flax by {flax}",
                    "multiply {name} by {torch} in Flax"),
        "added": ("Flax's values are torch's with {factor:+.6g} times {name} added",
                  "look for a factor of {name}"),
        "gradient": ("{gradient} is {factor} times torch's in Flax",
                     "look for a factor that only one side differentiates"),
    }),
    "residual": Cause("a summand is left out, added, or another one", {
        "missing": ("Flax leaves {name} out of the sum", "add {name}"),
        "added": ("Flax adds {name}, torch does not", "do not add {name}"),
        "": ("Flax adds {flax} where torch adds {torch}", "add {torch}"),
    }),
    "token": Cause("another step of a sequence, or a mean over it", {
        "": ("torch takes {torch} of {name}, Flax {flax}", "take {torch}"),
    }),
    "concat": Cause("two parts are concatenated in the other order", {
        "": ("the two halves of the last axis are swapped in Flax",
             "concatenate in the same order"),
    }),
    "reversed": Cause("a sequence or image is gone through back to front", {
        "": ("axis {axis} is back to front in Flax", "go through it in one direction"),
    }),

    # --- Found by changing torch's own computation, where no rule above knows the code ---
    "constant": Cause("another number in the code: a base, an exponent, a bound, a weight", {
        "table": ("torch makes a table by `{expression}`{place}; Flax nowhere has its numbers"
                  "{beside}",
                  "compare the numbers that both tables are made of"),
    }),
    "operation": Cause("another operation than torch's: a maximum for a mean, a sine for a cosine",
                       {}),
    "axis": Cause("a reduction, normalisation or sum over another axis", {}),
    "rearranged": Cause("a view, split or repetition that puts elements in another order", {
        "": ("torch's last axis is {torch}, Flax has it as {flax}: halves for neighbouring pairs, "
             "or back", "put the elements in torch's order"),
    }),
    "operand": Cause("operands exchanged, or another value taken as operand", {
        "": ("Flax takes {name} as it is here, torch does not",
             "see what torch's code makes of it, or takes instead: a sum, an activation"),
    }),
    "left_out": Cause("an operation of torch's that is left out, or one too many", {}),
    "order": Cause("the right operations in another order", {
        "": ("Flax calls {layer} before {other}, torch after it, on what it gives",
             "call the layers in torch's order"),
    }),
    "size": Cause("another size: of a window, a kernel, a number of steps", {}),

    # --- Precision, gradients ---
    "dtype": Cause("bfloat16 or float16 on the way", {
        "tensor": ("{name} was rounded to {dtype} on the way", "convert without a cast"),
        "parameters": ("Flax's parameters are rounded to {dtype}",
                       "remove {dtype} from the Flax layer"),
        "rounding": ("Flax's values are off as {dtype} rounding makes them: in most elements, "
                     "neither biased nor following the values",
                     "look for {dtype} before this value in Flax"),
        "": ("Flax computes in {dtype}: every value is a number of {dtype}, torch's are not",
             "remove dtype={dtype} (or a cast) from the Flax layer"),
    }),
    "stop_gradient": Cause("a gradient that is stopped on one side only", {
        "": ("{gradient} is zero in Flax, not in torch", "remove stop_gradient in the Flax layer"),
        "detach": ("{gradient} is zero in torch (detach), not in Flax", _DETACH),
        "statistics": ("{gradient} lacks in Flax what goes through the mean and variance",
                       "remove stop_gradient from the statistics in Flax"),
        "path": ("{gradient} lacks in Flax what comes back through {path}",
                 "remove stop_gradient from that path in Flax"),
        "path in torch": ("{gradient} has in Flax what comes back through {path}, "
                          "in torch it does not", _DETACH),
        "value": ("all gradients are Flax's where what torch computes as `{expression}` ({place}) "
                  "is detached", "remove stop_gradient there in Flax"),
        "operand": ("all gradients are Flax's where operand {which} of `{expression}` ({place}) is "
                    "detached in torch", "remove stop_gradient from it there in Flax"),
        "use": ("all gradients are Flax's where {name} is detached in torch's `{expression}` "
                "({place})", "remove stop_gradient there in Flax"),
        "detached": ("torch detaches in `{expression}` ({place}); all gradients are Flax's where "
                     "it does not", _DETACH),
        "untrained": ("{name} is trained in torch; Flax holds it, and not as a parameter",
                      "make it an nnx.Param, or put it among Linen's params"),
        "no_grad": ("torch computes a part without gradients (no_grad); all gradients are Flax's "
                    "where it does not", _DETACH),
    }),
    "kink": Cause("a gradient at a point that has none: a bound met exactly, a root at zero", {
        "": ("the gradient of {names} is another at these very inputs only: where they lie "
             "{aside:.0e} of their size beside, both agree, so a value stands exactly at a bound "
             "(clamp, maximum, abs), where each framework takes a derivative of its own",
             "use inputs that stand at no bound, or jnp.where with torch's choice in Flax"),
        "root": ("the gradient of {name} is not a number in Flax in {count} of {size} elements: "
                 "a square root, norm, standard deviation or logarithm is differentiated at zero, "
                 "where torch takes zero",
                 "keep zero out of the root by jnp.where, inside of it as well as around it"),
    }),

    # --- No cause that is known ---
    "compiled": Cause("XLA compiles the right code into something else", {
        "": ("the gradients of {names} are torch's where Flax's operations are run one by one; "
             "compiled, XLA computes the operand of a maximum a second time, rounded otherwise",
             "take the maximum by jnp.argmax and jnp.take_along_axis, whose gradient compares "
             "nothing"),
    }),
    "raises": Cause("Flax's code raises an error", {
        "": ("given torch's inputs, Flax's layer raises {message}",
             "compare its sizes and settings with torch's"),
    }),
    "shape": Cause("a value of another shape", {
        "": ("torch has the shape {torch} here, Flax {flax}", _SAME_SIZES),
    }),
    "not_finite": Cause("torch's own values are not finite, and nothing can equal them", {
        "": ("torch's own {name} has values that are not numbers (NaN), or beyond float32",
             "give inputs and weights with which the torch module gives finite numbers"),
    }),
    "random": Cause("a side that draws random numbers in its forward pass", {
        "": ("{who} random numbers in the forward pass: {names} change{s} from run to run, and no "
             "run can be held against another",
             "give the noise to both as an input argument, or let both take it from outside"),
    }),
    "unknown": Cause("no known cause fits", {
        "layer": ("its parameters are right and its inputs are torch's own, yet its output is not "
                  "torch's; no known cause fits", _LINE_BY_LINE),
        "between": ("the code between {before} and {after} computes something else; "
                    "no known cause fits", _LINE_BY_LINE),
        "statistics": ("{name} moves to other values than torch's; no known cause fits",
                       "compare how both update it"),
        "gradient": ("{gradient} is not torch's; no known cause fits",
                     "look for stop_gradient, custom derivatives and what is not differentiable"),
        "use": ("the gradient of {value} is {zero} in Flax, though what is made of it has torch's "
                "own: {uses}; no known cause fits",
                "look for stop_gradient, custom derivatives and what is not differentiable there"),
        "not compared": ("{name}: {why}", _ONE_RUN),
        "row": ("{name} differs, and no single layer is seen to make it so", _LINE_BY_LINE),
    }),
}
# fmt: on
