"""The Sparse Growing Transformer (arXiv 2603.23998) in one file of plain PyTorch, to test against.

Slow on purpose: every head of every pass is computed with an eager softmax and multiplied by its gate.
Nothing here is shared with megatron_sgt. Shapes: B batch, T sequence, D hidden, H query heads, G key/value
groups, d head size, L layers. Weights are a dict under Hugging Face Llama names; what they imply is read off
them: G from k_proj's rows, q/k norms from `q_norm` and `k_norm` (one RMSNorm of size d for all heads, or one over
all heads of sizes H·d and G·d), norms of outputs instead of inputs from `post_feedforward_layernorm`, biases
from their presence, a tied output from a missing `lm_head.weight`.

`settings` is the metadata of a golden file: model {num_layers, num_attention_heads, norm_eps, rope_theta, and
rotary_scaling {type llama3 | yarn | linear, factor, ...} where positions are scaled},
growth {the options of the schedule; method sgt | vanilla | block_loop, direction, head_choice, seed,
entropy_after_fixed, block_loop_layers and block_loop_count may be absent}, optim {lr, betas, eps,
weight_decay, clip}, steps, micro_batch; and, where the tokens come in documents, data {reset_attention_mask,
reset_position_ids, eod_mask_loss}, each of which may be absent.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
Settings = dict[str, Any]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def linear(w: Params, name: str, x: Tensor) -> Tensor:
    """x W^T, plus the bias if this projection has one."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def scaled(frequency: Tensor, theta: float, scaling: Settings) -> tuple[Tensor, float]:
    """Frequencies [d/2] of a longer context, and what cos and sin are multiplied by.

    llama3: between waves of context / high, which stay, and context / low, divided by the factor, as 1 / length.
    yarn (arXiv 2309.00071): so between two numbers of turns in the context, as the dimension.
    """
    factor, context = scaling["factor"], scaling.get("original_max_position_embeddings")
    if scaling["type"] == "linear":
        return frequency / factor, 1.0
    if scaling["type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        stays = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequency * (stays + (1 - stays) / factor), 1.0

    def dimension(turns: float) -> float:
        return len(frequency) * math.log(context / (2 * math.pi * turns)) / math.log(theta)

    down, up = (math.floor, math.ceil) if scaling.get("truncate", True) else (float, float)
    first = max(down(dimension(scaling.get("beta_fast", 32))), 0)
    last = min(up(dimension(scaling.get("beta_slow", 1))), 2 * len(frequency) - 1)
    ramp = ((torch.arange(len(frequency)) - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequency * (1 - ramp + ramp / factor), scaling.get("attention_factor", 0.1 * math.log(factor) + 1)


class Documents:
    """The documents of sequences [B, T]: starts [B, T] of each token's, tokens [B] before the padding at the end.

    hidden [B, 1, T, T]: which keys a query must not look at; positions [B, 1, T]; row [B]: the last token before the
    padding, and seen [B]: of how many tokens, 0 where too few for its entropy; counts [B, T]: labels of the loss.
    """

    def __init__(self, starts: Tensor, tokens: Tensor, data: Settings, least: int = 2) -> None:
        place, tokens = torch.arange(starts.shape[1]), tokens[:, None]
        first = starts if data.get("reset_attention_mask") else torch.where(place < tokens, 0, tokens)
        self.hidden = ((place > place[:, None]) | (place < first[:, :, None]))[:, None]
        self.positions = place - starts[:, None] * bool(data.get("reset_position_ids"))
        row = tokens.clamp(min=1) - 1
        seen = row + 1 - first.gather(1, row)
        self.row, self.seen = row[:, 0], (seen * ((tokens > 0) & (seen >= least)))[:, 0]
        crosses = starts.roll(-1, 1) != starts
        self.counts = (place + 1 < tokens) & ~(crosses & bool(data.get("eod_mask_loss")))

    def entropy(self, p: Tensor) -> Tensor:
        """Sum [H] over the sequences that count of the entropies of their last rows, each in its own unit."""
        rows = torch.special.entr(p[torch.arange(len(p)), :, self.row].detach()).sum(-1)
        return sum((rows[b] / math.log(n) for b, n in enumerate(self.seen.tolist()) if n), torch.zeros(p.shape[1]))


def rotary(x: Tensor, theta: float, scaling: Settings | None = None, positions: Tensor | None = None) -> Tensor:
    """Rotates x [B, heads, T, d] by its positions, pairing dimension i with i + d/2."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    frequency, factor = (frequency, 1.0) if scaling is None else scaled(frequency, theta, scaling)
    positions = torch.arange(x.shape[-2]) if positions is None else positions
    angle = positions[..., None].float() * frequency
    cos, sin = angle.cos() * factor, angle.sin() * factor
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(
    w: Params, x: Tensor, gates: Tensor | None, model: Settings, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """One pass over x [B, T, D], normed or not: W_o concat_h(g_h head_h) [B, T, D]; its last rows' entropy [H].

    w holds one layer's weights; gates [H], None for the ordinary attention. The entropy is the mean over the sequences,
    with documents their sum.
    """
    batch, length, _ = x.shape
    heads, eps = model["num_attention_heads"], model["norm_eps"]

    size = w["self_attn.q_proj.weight"].shape[0] // heads

    def split(name: str) -> Tensor:
        rows, norm = linear(w, f"self_attn.{name}_proj", x), w.get(f"self_attn.{name}_norm.weight")
        if norm is not None and len(norm) == rows.shape[-1]:  # over all heads, whichever gates they have
            rows = rms_norm(rows, norm, eps)
        parts = rows.view(batch, length, -1, size)
        if norm is not None and len(norm) == size:
            parts = rms_norm(parts, norm, eps)
        return parts.transpose(1, 2)

    q, k, v = split("q"), split("k"), split("v")
    positions = None if documents is None else documents.positions
    q, k = (rotary(y, model["rope_theta"], model.get("rotary_scaling"), positions) for y in (q, k))
    k, v = (y.repeat_interleave(heads // y.shape[1], dim=1) for y in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    p = scores.masked_fill(future if documents is None else documents.hidden, -torch.inf).softmax(-1)
    if documents is None:
        entropy = torch.special.entr(p[:, :, -1].detach()).sum(-1).mean(0) / math.log(length)
    else:
        entropy = documents.entropy(p)
    out = p @ v
    if gates is not None:
        out = out * gates.view(1, heads, 1, 1)
    return linear(w, "self_attn.o_proj", out.transpose(1, 2).reshape(batch, length, -1)), entropy


def layer(
    w: Params, x: Tensor, loops: int, gates: Tensor, model: Settings, documents: Documents | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One decoder layer with `loops` additional attention passes; also the entropies [H] of each pass."""
    entropies = []
    outputs = "post_feedforward_layernorm.weight" in w
    before = [None, None] if outputs else ["input_layernorm", "post_attention_layernorm"]
    after = ["post_attention_layernorm", "post_feedforward_layernorm"] if outputs else [None, None]

    def norm(name: str | None, y: Tensor) -> Tensor:
        return y if name is None else rms_norm(y, w[f"{name}.weight"], model["norm_eps"])

    for index in range(1 + loops):
        out, entropy = attention(w, norm(before[0], x), gates if index else None, model, documents)
        x = x + norm(after[0], out)
        entropies.append(entropy)
    normed = norm(before[1], x)
    gate, up = linear(w, "mlp.gate_proj", normed), linear(w, "mlp.up_proj", normed)
    return x + norm(after[1], linear(w, "mlp.down_proj", torch.nn.functional.silu(gate) * up)), entropies


def forward(
    params: Params,
    tokens: Tensor,
    model: Settings,
    loops: list[int],
    gates: Tensor,
    blocks: dict[int, int],
    documents: Documents | None = None,
) -> tuple[Tensor, list[list[Tensor]]]:
    """Logits [B, T, vocabulary] of tokens [B, T], and per layer the entropies [H] of its passes 0..K_l.

    loops: K_l per layer; gates [L, H]; blocks: additional executions of whole layers (block loop).
    """
    x = params["model.embed_tokens.weight"][tokens]
    entropies = []
    for n in range(model["num_layers"]):
        prefix = f"model.layers.{n}."
        w = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        x, measured = layer(w, x, loops[n], gates[n], model, documents)
        for _ in range(blocks.get(n, 0)):
            x, _ = layer(w, x, loops[n], gates[n], model, documents)
        entropies.append(measured)
    x = rms_norm(x, params["model.norm.weight"], model["norm_eps"])
    return x @ params.get("lm_head.weight", params["model.embed_tokens.weight"]).T, entropies


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of tokens[1:] given tokens[:-1]; the last position has no label."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def summed_loss(logits: Tensor, tokens: Tensor, documents: Documents) -> Tensor:
    """Sum of the cross-entropies that count."""
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="none")
    return found[documents.counts.flatten()].sum()


class ReferenceSchedule:
    """Growth as a table of gates [L][H] and the rules of the method, in Python floats."""

    def __init__(self, growth: Settings, num_layers: int, num_heads: int) -> None:
        self.cfg = {"direction": "deep_to_shallow", "head_choice": "highest", "seed": 0, **growth}
        self.shape = range(num_layers), range(num_heads)
        self.phase = "vanilla"
        self.selected: list[int] = []
        self.kept: dict[int, list[int]] = {}
        self.chosen_at: dict[int, int] = {}
        self.loops = [0] * num_layers
        self.gates = [[1.0] * num_heads for _ in self.shape[0]]
        self.ema = [[0.0] * num_heads for _ in self.shape[0]]
        self.window_end = 0
        self.grows = self.cfg.get("method", "sgt") == "sgt"

    def collects(self) -> bool:
        return self.grows and (self.phase != "fixed" or self.cfg.get("entropy_after_fixed", False))

    def fold(self, entropies: Any) -> None:
        """entropies[l][pass][h] of one optimizer step, averaged over its micro-batches."""
        if not self.collects():
            return
        beta = self.cfg["ema_decay"]
        for n in self.shape[0]:
            for h in self.shape[1]:
                seen = self.loops[n] if h in self.kept.get(n, []) else 0
                value = float(entropies[n][seen][h])
                if math.isfinite(value):
                    self.ema[n][h] = beta * self.ema[n][h] + (1 - beta) * value

    def act(self, step: int) -> dict[str, Any] | None:
        """Gates, then the decision after optimizer step `step`; the event, if there was one."""
        cfg = self.cfg
        for n in self.selected:
            for h in self.shape[1]:
                fading = h not in self.kept[n]
                self.gates[n][h] = self.decayed((step - self.chosen_at[n]) / cfg["window_size"]) if fading else 1.0
        if not self.grows or self.phase == "fixed" or step < self.window_end:
            return None
        if self.phase == "vanilla" and step < cfg["first_selection_step"]:
            return None
        score = [sum(row) / len(row) for row in self.ema]
        eligible = [n for n in self.shape[0] if n not in cfg["exclude_layers"]]
        top = sorted(eligible, key=lambda n: (-score[n], n))[: cfg["top_k_layers"]]
        for n in self.selected:
            if n in top and self.loops[n] < cfg["max_loop_depth"]:
                self.loops[n] += 1
                self.window_end = step + cfg["window_size"]
                return self.event(step, "increase_depth", n)
        sign = 1 if cfg["direction"] == "deep_to_shallow" else -1
        free = [n for n in top if all(sign * n < sign * m for m in self.selected)]
        if not free or len(self.selected) >= cfg["max_selected_layers"]:
            self.phase = "fixed"
            return self.event(step, "fixed", None)
        return self.select(max(free, key=lambda n: sign * n), step)

    def select(self, n: int, step: int) -> dict[str, Any]:
        keys: dict[str, Callable[[int], Any]] = {
            "highest": lambda h: (-self.ema[n][h], h),
            "lowest": lambda h: (self.ema[n][h], h),
            "random": lambda h: hashlib.sha256(f"{self.cfg['seed']}:{n}:{step}:{h}".encode()).hexdigest(),
        }
        choice = self.cfg["head_choice"]
        heads = list(self.shape[1])
        if choice != "all":
            heads = sorted(sorted(heads, key=keys[choice])[: self.cfg["num_keep_heads"]])
        action = "select_new_layer" if self.selected else "first_selection"
        self.phase = "selecting"
        self.selected.append(n)
        self.kept[n], self.chosen_at[n], self.loops[n] = heads, step, 1
        self.window_end = step + self.cfg["window_size"]
        return self.event(step, action, n)

    def event(self, step: int, action: str, layer_id: int | None) -> dict[str, Any]:
        kept = {str(n): list(self.kept[n]) for n in sorted(self.kept)}
        return {"step": step, "action": action, "layer": layer_id, "phase": self.phase, "kept_heads": kept}

    def decayed(self, r: float) -> float:
        if r >= 1:
            return 0.0
        curve = self.cfg["decay_type"]
        if curve == "linear":
            return 1 - r
        return 0.5 * (1 + math.cos(math.pi * r)) if curve == "cosine" else math.pow(10, -8 * r)

    def inference_gates(self) -> list[list[float]]:
        return [[float(h in self.kept.get(n, self.shape[1])) for h in self.shape[1]] for n in self.shape[0]]


def block_loops(growth: Settings) -> dict[int, int]:
    """The block-loop baseline: additional executions of whole layers, fixed from the first step."""
    if growth.get("method", "sgt") != "block_loop":
        return {}
    return {n: growth.get("block_loop_count", 1) for n in growth["block_loop_layers"]}


def train_step(
    params: Params,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    schedule: ReferenceSchedule,
    settings: Settings,
    documents: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float]:
    """One optimizer step on tokens batch [sequences, T]: (loss, gradient norm before clipping).

    Folds the mean entropies of its micro-batches into the schedule; of its sequences that count, with documents: starts
    [sequences, T] and tokens [sequences] before the padding.
    """
    model, blocks = settings["model"], block_loops(settings["growth"])
    rows = range(len(batch))
    micro_batches = [list(rows[n : n + settings["micro_batch"]]) for n in rows[:: settings["micro_batch"]]]
    least = settings["growth"].get("entropy_min_document_tokens", 2)
    whole = None if documents is None else Documents(*documents, settings["data"], least)
    gates = torch.tensor(schedule.gates)
    loss, entropies = 0.0, []
    optimizer.zero_grad()
    for chosen in micro_batches:
        micro_batch = batch[chosen]
        if documents is None or whole is None:
            logits, measured = forward(params, micro_batch, model, schedule.loops, gates, blocks)
            share = next_token_loss(logits, micro_batch) * (len(micro_batch) / len(batch))
        else:
            own = Documents(*(part[chosen] for part in documents), settings["data"], least)
            logits, measured = forward(params, micro_batch, model, schedule.loops, gates, blocks, own)
            share = summed_loss(logits, micro_batch, own) / whole.counts.sum()
        share.backward()
        loss += share.item()
        entropies.append(measured)
    divisor = len(micro_batches) if whole is None else int((whole.seen > 0).sum())
    norm = torch.nn.utils.clip_grad_norm_(list(params.values()), settings["optim"]["clip"])
    optimizer.step()
    if divisor:
        schedule.fold(
            [
                [(torch.stack(same_pass).sum(0) / divisor).tolist() for same_pass in zip(*same_layer, strict=True)]
                for same_layer in zip(*entropies, strict=True)
            ]
        )
    return loss, norm.item()


def run_trajectory(
    init: Params,
    tokens: Tensor,
    settings: Settings,
    probe_tokens: Tensor,
    documents: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """Trains from init on tokens [steps, sequences, T]; a golden file's values under its keys, and "events".

    documents: starts [steps, sequences, T] and tokens [steps, sequences] before the padding. head_decay and loop_depth
    are those after the step, which the next step executes; probe_logits are in inference mode (gates 0 or 1) after the
    last step.
    """
    if settings["optim"]["schedule"] != "constant":
        raise ValueError(f"learning-rate schedule {settings['optim']['schedule']!r}: the reference knows constant")
    model, optim = settings["model"], settings["optim"]
    params = {name: w.detach().to(torch.get_default_dtype()).clone().requires_grad_() for name, w in init.items()}
    optimizer = torch.optim.AdamW(
        params.values(),
        lr=optim["lr"],
        betas=tuple(optim["betas"]),
        eps=optim["eps"],
        weight_decay=optim["weight_decay"],
    )
    schedule = ReferenceSchedule(settings["growth"], model["num_layers"], model["num_attention_heads"])
    rows: dict[str, list[Any]] = {k: [] for k in ("loss", "grad_norm", "ema_entropy", "head_decay", "loop_depth")}
    events = []
    for step in range(1, settings["steps"] + 1):
        told = None if documents is None else (documents[0][step - 1].long(), documents[1][step - 1].long())
        loss, norm = train_step(params, optimizer, tokens[step - 1].long(), schedule, settings, told)
        event = schedule.act(step)
        events += [event] if event else []
        now = (
            loss,
            norm,
            torch.tensor(schedule.ema),
            torch.tensor(schedule.gates),
            torch.tensor(schedule.loops),
        )
        for values, value in zip(rows.values(), now, strict=True):
            values.append(value)
    with torch.no_grad():
        gates = torch.tensor(schedule.inference_gates())
        blocks = block_loops(settings["growth"])
        logits, _ = forward(params, probe_tokens.long(), model, schedule.loops, gates, blocks)
    exact = {key: torch.tensor(rows.pop(key), dtype=torch.float64) for key in ("loss", "grad_norm")}
    final = {f"final/{name}": w.detach() for name, w in params.items()}
    tables = {key: torch.stack(values) for key, values in rows.items()}
    return {**exact, **tables, **final, "probe_logits": logits, "events": events}
