"""How `tandem plan` shows what it found: tables of at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from trainer.planning.advice import Advice, gigabytes
from trainer.planning.hardware import FRAGMENTATION, GB, LINK_SHARE, RESERVE, UTILISATION
from trainer.planning.plan import Plan

WIDTH = 100

MEANING = {
    "weights": "the policy's base",
    "adapter": "what is trained, float32",
    "reference": "a frozen copy of its own",
    "secondary weights": "a second copy, spread over hpz_partition_size GPUs",
    "gradients": "of what is trained",
    "optimizer": "its state",
    "communication": "buckets that gradients wait in",
    "buffers": "rotary frequencies and the like",
    "gathered weights": "whole layers while they compute, and those fetched ahead",
    "activations": "kept for the backward pass, and at work",
    "logits": "scored positions x vocabulary, float32 copies and gradients too",
    "reference forward": "what the reference's forward holds at that moment",
    "optimizer's copies": "of what it steps, where they are more than activations were",
    "reserve": f"CUDA, cuBLAS, NCCL {gigabytes(RESERVE)} GB, and {FRAGMENTATION:.0%} of what comes and goes",
}


def show(plan: Plan, advice: Sequence[Advice], within_nodes: Plan | None = None) -> None:
    """Print one plan, and what to change: where it does not fit, or where other nodes are waited for."""
    console = Console(width=WIDTH, highlight=False)
    console.print(_heading(plan))
    console.print(_memory(plan))
    if plan.host:
        console.print(f"offloaded to each node's own memory: {gigabytes(plan.host)} GB")
    for line in _step(plan):
        console.print(line)
    if within_nodes is not None:
        seconds, size = within_nodes.seconds, gigabytes(within_nodes.total)
        console.print(
            f"with zero3's hpz_partition_size: {within_nodes.job.zero.hpz_partition_size} weights are fetched within a"
            f" node: communication {seconds.communication:,.2f} s, and {size} GB on each GPU"
        )
    if not plan.fits:
        console.print(_changes(advice, plan))
    console.print(_assumptions(plan), style="dim")


def _heading(plan: Plan) -> str:
    counts, job, cluster = plan.parameters, plan.job, plan.cluster
    at_once = job.at_once(cluster.gpus)
    what = "pairs" if job.reference is not None else "demonstrations"
    reference = "none" if job.reference is None else job.reference.kind
    return (
        f"[bold]{job.policy.base}[/bold], {job.policy.dtype}: {counts.policy:,} parameters, {counts.trained:,} trained;"
        f" reference {reference}"
        + (f", {counts.reference:,} more" if counts.reference else "")
        + f"\n{cluster.gpus} GPU{'s' * (cluster.gpus > 1)} on {cluster.nodes} node{'s' * (cluster.nodes > 1)},"
        f" {job.strategy}; a step is {job.batch_size} {what}: {job.forwards(cluster.gpus)} x {at_once} on each GPU,"
        f" rows of {job.tokens} tokens, {job.completion} scored"
    )


def _memory(plan: Plan) -> Table:
    table = Table(title="memory on each GPU at the moment of the most", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    table.add_column("what it is", style="dim")
    for part, size in plan.memory.items():
        table.add_row(part, _precise(size), MEANING[part])
    table.add_section()
    room = plan.cluster.memory - plan.total
    verdict = (
        f"[green]fits, {gigabytes(room)} GB are left[/green]"
        if plan.fits
        else f"[red]does not fit, {gigabytes(-room)} GB too much[/red]"
    )
    table.add_row(
        "total", f"{plan.total / GB:,.2f}", f"of {gigabytes(plan.cluster.memory)}: {verdict}", style="bold"
    )
    return table


def _precise(size: int) -> str:
    return f"{size / GB:,.2f}" if size >= 5e6 else f"{size / GB:.5f}"


def _step(plan: Plan) -> list[str]:
    seconds, flops = plan.seconds, plan.flops
    lines = [
        f"each step, each GPU: {sum(flops.values()) / 1e12:,.0f} TFLOP (policy {flops['policy'] / 1e12:,.0f}, reference"
        f" {flops['reference'] / 1e12:,.0f}, backward {flops['backward'] / 1e12:,.0f})"
    ]
    if plan.job.policy.adapter is not None:
        lines[0] += "; frozen weights need no gradients, so the backward pass costs about a forward"
    if plan.cluster.gpus > 1:
        lines.append(
            f"between GPUs: {gigabytes(plan.gathered)} GB of weights come in, {plan.reduced / 1e6:,.1f} MB of"
            " gradients go out"
        )
    parts = [f"compute {seconds.compute:,.2f} s"]
    if plan.cluster.gpus > 1:
        parts.append(f"communication {seconds.communication:,.2f} s")
    if seconds.host:
        parts.append(f"transfers from the CPU's memory {seconds.host:,.2f} s")
    bound = {"host": "the CPU's memory"}.get(seconds.bound, seconds.bound)
    return [*lines, f"estimate: {', '.join(parts)}: [bold]{bound} bounds the step[/bold]"]


def _changes(advice: Sequence[Advice], plan: Plan) -> Table | str:
    if not advice:
        return "[red]no change that plan knows makes it smaller[/red]: take a smaller model or larger GPUs"
    table = Table(title="what to change, one after the other", title_justify="left")
    table.add_column("setting")
    for name in ("alone, GB", "with those above, GB"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for change in advice:
        table.add_row(
            change.setting,
            gigabytes(change.alone),
            gigabytes(change.together),
            "[green]yes[/green]" if change.fits else "no",
        )
    if not advice[-1].fits:
        table.caption = (
            f"not enough for {gigabytes(plan.cluster.memory)} GB: take a smaller model or larger GPUs"
        )
    return table


def _assumptions(plan: Plan) -> str:
    return (
        "GB are 10^9 bytes. Weights, optimizer and gradients are exact; activations are those of the real forward and"
        " backward on shapes.\nTimes are estimates from data sheets: "
        f"{UTILISATION:.0%} of the FLOP/s, {LINK_SHARE:.0%} of the links"
        + (f", {gigabytes(plan.cluster.network)} GB/s into a node" if plan.cluster.nodes > 1 else "")
        + ", all rows as long as the longest."
    )


def show_sweep(plans: Sequence[tuple[Plan, int]]) -> None:
    """Print one line for each number of GPUs and strategy."""
    console = Console(width=WIDTH, highlight=False)
    first = plans[0][0]
    job = first.job
    console.print(
        f"[bold]{job.policy.base}[/bold], {job.policy.dtype}: {first.parameters.policy:,} parameters,"
        f" {first.parameters.trained:,} trained; rows of {job.tokens} tokens;"
        f" {gigabytes(first.cluster.memory)} GB a GPU"
    )
    table = Table()
    for name in ("GPUs", "nodes"):
        table.add_column(name, justify="right")
    table.add_column("strategy", no_wrap=True)
    for name in ("batch", "at once", "GB", "least GB", "gathered", "s a step"):
        table.add_column(name, justify="right")
    table.add_column("bound by", no_wrap=True)
    for plan, least in plans:
        _sweep_row(table, plan, least)
    console.print(table)
    console.print(
        "at once: examples of a micro-batch on one GPU. GB: of memory on each. least: with one example at once and\n"
        "policy.gradient_checkpointing. gathered: GB of weights that come into each GPU in a step. Green fits.\n"
        "A batch smaller than the GPUs is raised to one example each. Times are estimates from data"
        " sheets.",
        style="dim",
    )


def _sweep_row(table: Table, plan: Plan, least: int) -> None:
    cluster = plan.cluster

    def coloured(size: int) -> str:
        colour = "green" if size <= cluster.memory else "red"
        return f"[{colour}]{gigabytes(size)}[/{colour}]"

    table.add_row(
        str(cluster.gpus),
        str(cluster.nodes),
        {"single_device": "one GPU"}.get(plan.job.strategy, plan.job.strategy),
        str(plan.job.batch_size),
        str(plan.job.at_once(cluster.gpus)),
        coloured(plan.total),
        coloured(least),
        gigabytes(plan.gathered),
        f"{plan.seconds.step:,.1f}",
        plan.seconds.bound,
    )
