"""Tasks of lm-evaluation-harness that a run measures while it trains."""

from collections.abc import Iterator

from pydantic import Field

from megatron_sgt.config.base import PathText, Section


class EvaluationConfig(Section):
    """Downstream tasks on the training model, with the structure of inference (docs/huggingface.md)."""

    tasks: tuple[str, ...] = Field(
        default=(),
        description="Tasks, groups or tags of lm-evaluation-harness, by name; needs pip install megatron-sgt[eval].",
    )
    include_path: PathText | None = Field(
        default=None, description="Folder of task definitions of your own (YAML); null: the harness's alone."
    )
    tasks_interval: int = Field(
        default=0, ge=0, description="Run the tasks every so many steps, and after the last one; 0: only then."
    )
    limit: int | None = Field(default=None, gt=0, description="The first so many questions of each task; null: all.")
    num_fewshot: int | None = Field(
        default=None, ge=0, le=1000, description="Examples before every question; null: as the task says."
    )

    def problems(self) -> Iterator[str]:
        if twice := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            yield f"tasks: {twice} more than once"
        if not all(name.strip() for name in self.tasks):
            yield "tasks: a name is empty"
        given = {"tasks_interval": self.tasks_interval or None, "limit": self.limit, "num_fewshot": self.num_fewshot}
        for name, value in given.items():
            if value is not None and not self.tasks:
                yield f"{name}: {value} has no effect without tasks; name some, or remove it"
