"""Configuration of a Sparse Growing Transformer (arXiv 2603.23998) for transformers 4.57 and 5."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

SCALED = ("linear", "llama3", "yarn")
"""Values of ``rope_type`` beside "default" whose frequencies do not depend on the length of a text."""


def _rope_settings(theta: float, *given: dict[str, Any] | None) -> dict[str, Any]:
    """``rope_parameters`` as transformers 5 has them, from what either version gives; later ones go first.

    Raises:
        ValueError: a type that this model does not have.
    """
    merged = {name: value for settings in given for name, value in (settings or {}).items() if value is not None}
    kind = merged.pop("type", "default")
    settings = {"rope_type": kind, "rope_theta": theta, **merged}
    if settings["rope_type"] not in ("default", *SCALED):
        raise ValueError(f"rope_type {settings['rope_type']!r}: choose default, {', '.join(SCALED)}")
    return settings


def _set_rope(config: PretrainedConfig, settings: dict[str, Any]) -> None:
    """Give ``config`` its rotary settings under the names of both versions of transformers."""
    config.rope_theta = settings["rope_theta"]
    config.rope_parameters = settings
    if not hasattr(PretrainedConfig, "standardize_rope_params"):  # transformers 4
        scaled = settings["rope_type"] != "default"
        config.rope_scaling = {k: v for k, v in settings.items() if k != "rope_theta"} if scaled else None


def _check_entries(layer: str, loop: dict[str, Any]) -> None:
    unknown = sorted(set(loop) - {"heads", "depth", "other_gate", "block_loops"})
    counts, gate = [loop.get(name, 0) for name in ("depth", "block_loops")], loop.get("other_gate", 0.0)
    if unknown or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise ValueError(
            f"sgt_loops: layer {layer} has {loop}; depth and block_loops count, others are heads, other_gate"
        )
    if not isinstance(gate, int | float) or not 0 <= gate <= 1:
        raise ValueError(f"sgt_loops: layer {layer} has other_gate {gate}; it is a number in (0, 1], or left out")


class SGTConfig(PretrainedConfig):
    """A LLaMA-style decoder, some layers of which attend again with some of their heads.

    Args (beyond those of ``LlamaConfig``, under its names):
        sgt_loops: layer (as text, from 0) -> ``{"heads": [4, 11], "depth": 1}``: these query heads are executed
            ``depth`` more times, each time with a residual of its own. Optional entries of a layer:
            ``"other_gate"``: the gate in (0, 1] of its other heads, of a model exported inside a decay window;
            ``"block_loops"``: how often the whole layer is executed again (the static baseline; ``depth`` is 0).
        attention_bias, attention_out_bias, mlp_bias: biases of q/k/v, of the output projection, of the MLP.
        norm_position: "input": x + F(Norm(x)) of attention, each of its loops, and the MLP; "output": x + Norm(F(x)).
        qk_norm: RMSNorm of every query and key head before the rotation; with ``qk_norm_over`` "all", of the queries
            of all heads together, and of the keys.
        normalization: "RMSNorm" or "LayerNorm".
        gated_mlp: down(act(gate(x)) * up(x)) if true, else down(act(up(x))).
        rope_parameters, rope_scaling: as transformers 5 and 4 have them; of rope_type default, linear, llama3 or yarn.

    Raises:
        ValueError: ``sgt_loops`` names a layer or a head that does not exist, or has other entries; another rope_type.
    """

    model_type = "sgt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (as in transformers)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 5504,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        gated_mlp: bool = True,
        normalization: str = "RMSNorm",
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        max_position_embeddings: int = 4096,
        norm_position: str = "input",
        qk_norm: bool = False,
        qk_norm_over: str = "head",
        attention_bias: bool = False,
        attention_out_bias: bool = False,
        mlp_bias: bool = False,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        sgt_loops: dict[str, dict[str, Any]] | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.normalization = normalization
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        _set_rope(self, _rope_settings(rope_theta, rope_scaling, rope_parameters))
        self.norm_position, self.qk_norm, self.qk_norm_over = norm_position, qk_norm, qk_norm_over
        self.attention_bias, self.attention_out_bias, self.mlp_bias = attention_bias, attention_out_bias, mlp_bias
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.sgt_loops = {str(layer): dict(loop) for layer, loop in (sgt_loops or {}).items()}
        self._check_loops()
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def loop_of(self, layer: int) -> dict[str, Any]:
        return {
            "heads": [],
            "depth": 0,
            "other_gate": 0.0,
            "block_loops": 0,
            **self.sgt_loops.get(str(layer), {}),
        }

    def loops(self) -> bool:
        """Whether any layer attends more than once."""
        return any(self.passes_of(int(layer)) > 1 for layer in self.sgt_loops)

    def passes_of(self, layer: int) -> int:
        """Attention passes of one layer: 1, and the loops. It has as many entries in a cache."""
        loop = self.loop_of(layer)
        return (1 + loop["depth"]) * (1 + loop["block_loops"])

    def _check_loops(self) -> None:
        if self.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(f"normalization {self.normalization!r}: choose RMSNorm or LayerNorm")
        if self.norm_position not in ("input", "output"):
            raise ValueError(f"norm_position {self.norm_position!r}: choose input or output")
        if self.qk_norm_over not in ("head", "all"):
            raise ValueError(f"qk_norm_over {self.qk_norm_over!r}: choose head or all")
        for layer, loop in self.sgt_loops.items():
            _check_entries(layer, loop)
            if not layer.isdecimal() or layer != str(int(layer)) or int(layer) >= self.num_hidden_layers:
                raise ValueError(f"sgt_loops: layer {layer} of a model with {self.num_hidden_layers} layers")
            heads = loop.get("heads", [])
            if not all(isinstance(h, int) and 0 <= h < self.num_attention_heads for h in heads):
                raise ValueError(f"sgt_loops: heads {heads} of layer {layer}, which has {self.num_attention_heads}")
            if bool(heads) != bool(loop.get("depth", 0)) or len(set(heads)) != len(heads):
                raise ValueError(f"sgt_loops: layer {layer} loops heads {heads} to depth {loop.get('depth', 0)}")
