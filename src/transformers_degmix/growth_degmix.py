"""Adding tasks to a model, and taking them away."""

from typing import Any

from .configuration_degmix import complete_fields


class GrowingTasksMixin:
    """For a model with `task_parts`: the modules that hold a part of each task, each with what builds such a part."""

    def add_task(self, name: str, task: dict[str, Any], train_only_new: bool = True):
        """Gives the model a further task, with a mixer, a task query attention and a head of its own.

        The new task attends to all tasks, unless its `attends_to` says otherwise. No other task attends to it, so that
        their outputs stay the same to the last bit. The image processor needs the new tasks too:
        `DeGMixImageProcessor.from_pretrained(path, tasks=model.config.tasks)`.

        Args:
            name: of the task.
            task: its fields, see [`DeGMixConfig`].
            train_only_new: whether everything else is frozen. Training on labels of the new task alone then leaves
                the other tasks' outputs as they are; `num_parameters(only_trainable=True)` counts what is trained.
                To train several new tasks together, set it for the first only.

        Raises:
            ValueError: there is such a task, or a field has a value that is not allowed. The model is unchanged.
        """
        config = self.config
        if name in config.tasks:
            raise ValueError(f"the model has a task {name!r}; its tasks are {list(config.tasks)}")
        closed = {other: {**fields, "attends_to": config.attended(other)} for other, fields in config.tasks.items()}
        config.tasks = complete_fields({**closed, name: task})
        if train_only_new:
            self.requires_grad_(False)
        checkpointing = next((x for x in self.modules() if getattr(x, "gradient_checkpointing", False)), None)
        for modules, build in self.task_parts():
            modules[name] = build(name).apply(self._initialize_weights).to(self.device, self.dtype)
            for module in modules[name].modules():
                if checkpointing and hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = checkpointing._gradient_checkpointing_func
        self.train(self.training)

    def remove_task(self, name: str, keep_outputs: bool = True):
        """Removes a task from the model, with its mixer, task query attention and head.

        Args:
            name: of the task.
            keep_outputs: whether to refuse if other tasks attend to it, because their outputs would change.
                Outputs of tasks that do not attend to it stay the same to the last bit.

        Raises:
            ValueError: there is no such task, it is the only one, or others attend to it and `keep_outputs` is set.
                The model is unchanged.
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
