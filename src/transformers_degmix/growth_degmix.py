"""Adding tasks to a model, and taking them away."""

from typing import Any

from .configuration_degmix import complete_fields


class GrowingTasksMixin:
    """For a model with `task_parts`: the modules that hold a part of each task, and what makes such a part."""

    def add_task(self, name: str, task: dict[str, Any], train_only_new: bool = True):
        """Gives the model a further task, with a mixer, a task query attention and a head of its own.

        The new task attends to all tasks, unless its `attends_to` says otherwise, and none of the others attends to
        it: their outputs stay the same to the last bit. The image processor needs to know too:
        `DeGMixImageProcessor.from_pretrained(path, tasks=model.config.tasks)`.

        Args:
            name: of the task.
            task: its fields, see [`DeGMixConfig`].
            train_only_new: whether everything else is frozen. A training on labels of the new task alone then leaves
                the other tasks' outputs as they are; `num_parameters(only_trainable=True)` counts what it trains.
                Of several new tasks that are to be trained together, only the first is added with `True`.

        Raises:
            ValueError: there is such a task, or a field has a value that is not allowed. The model is as it was.
        """
        config = self.config
        if name in config.tasks:
            raise ValueError(f"the model has a task {name!r}; its tasks are {list(config.tasks)}")
        closed = {other: {**fields, "attends_to": config.attended(other)} for other, fields in config.tasks.items()}
        config.tasks = complete_fields({**closed, name: task})
        if train_only_new:
            self.requires_grad_(False)
        for modules, build in self.task_parts():
            modules[name] = build(name).apply(self._initialize_weights).to(self.device, self.dtype)
        self.train(self.training)

    def remove_task(self, name: str, keep_outputs: bool = True):
        """Takes a task from the model, with its mixer, task query attention and head.

        Args:
            name: of the task.
            keep_outputs: whether to refuse to remove a task that others attend to, which would change their outputs.
                Outputs of tasks that do not attend to it stay the same to the last bit.

        Raises:
            ValueError: there is no such task or no other, or others attend to it and are to keep their outputs. The
                model is as it was.
        """
        config = self.config
        if name not in config.tasks:
            raise ValueError(f"the model has no task {name!r}; its tasks are {list(config.tasks)}")
        others = {other: config.attended(other) for other in config.tasks if other != name}
        dependent = [other for other, attended in others.items() if name in attended]
        if dependent and keep_outputs:
            raise ValueError(
                f"the tasks {dependent} attend to {name!r}, and their outputs would change without it; "
                "`keep_outputs=False` allows that"
            )
        config.tasks = complete_fields(
            {
                other: {**config.tasks[other], "attends_to": [task for task in attended if task != name]}
                for other, attended in others.items()
            }
        )
        for modules, _ in self.task_parts():
            del modules[name]
