"""What a run reports: console lines, JSON lines, TensorBoard, Weights & Biases, throughput. No torch here.

A report is a kind and a record, a dict of host numbers. Only rank 0 has writers; the hub of every other
rank is empty. Every field but `step` may be absent or None: it is then not shown. Units are in the names.

train    step, train_iters, consumed_samples, consumed_tokens, global_batch_size, loss, grad_norm, lr,
         loss_scale, step_time_s (from the end of a step to that of the next, without validation and saving, which
         tell their own; without the first step of a process, unless it is alone), first_step_s (in the first record
         of a process: with what is compiled and allocated in that step), tokens_per_second,
         tokens_per_second_per_device, tflops_per_device, mfu (fraction of the peak; None where the peak is
         unknown), memory_gb, memory_total_gb, device ("gpu" or "cpu": names the per-device figures), eta_s,
         skipped_steps and nan_steps (since the last train record), loops (sum of K_l), other_gate
valid    step, loss, perplexity, batches, seconds
growth   GrowthEvent.to_dict() and flops_overhead (fraction of vanilla's), layer_rank and num_candidates (of
         the selected layer among the selectable ones), fade_until_step, max_selected_layers, ema_entropy
         [layer][head] that the decision was taken from
save     step, path, seconds (until it was whole), stall_s (of them, those in which training stood still), bytes
save_failed  step, reason: training goes on, and saves at the next interval
resume   step, path (None: a fresh start), searched (where a checkpoint was looked for), consumed_samples,
         skipped (damaged checkpoints that were passed over), changed (settings that differ from the
         checkpoint's: "train.train_iters 8 -> 12")
ranks    step, step_time_s, work_s and data_wait_s (a list by rank: the median over steps of the timed part of
         its own work, the mean of its waiting for data); for a rank that is newly found to hold up the
         others: lagging_rank, host, what ("computing" or "waiting for data"), excess (fraction)
rollback step (where the run goes on), path (None: no checkpoint to go back to), spike_step, loss, limit,
         passed_samples, consumed_samples
stop     step, reason (the signal, or the limit of time that was passed)
summary  step, train_iters, reason, exit_code, first_loss, loss, valid_loss, growth_events, seconds, consumed_tokens,
         tokens_per_second, paths (name -> path)
"""

from megatron_sgt.metrics.console import ConsoleWriter
from megatron_sgt.metrics.hub import KINDS, METRICS_FILE, MetricsHub, build_hub
from megatron_sgt.metrics.throughput import EtaEstimator, peak_flops, throughput_record
from megatron_sgt.metrics.writers import TensorBoardWriter, WandbWriter, Writer

__all__ = [
    "KINDS",
    "METRICS_FILE",
    "ConsoleWriter",
    "EtaEstimator",
    "MetricsHub",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
    "build_hub",
    "peak_flops",
    "throughput_record",
]
