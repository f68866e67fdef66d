import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="8. Asynchronous")

with app.setup:
    import lesson
    import marimo as mo
    from lesson import KIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 8. Asynchronous

    All strategies so far compute what one process would, and pay for it: ranks wait for each other
    in every step. Two others give up equal losses for less waiting:

    * `local_sgd`: each rank trains alone for `sync_every` steps, then the ranks take the mean of
      their weights;
    * `parameter_server`: one rank holds the weights. Workers pull them, compute a gradient, push
      it, and wait for nobody.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What to count

    A rank of `local_sgd` that meets the others every $H$ steps sends $1/H$ of `ddp`'s bytes. `ddp`
    on two ranks sends as many bytes as the gradients have, 471 KiB a step.

    A gradient's **staleness** is the number of updates that the weights had between the worker's
    pull and its push. With $W$ workers that take turns, the others push once each in the meantime.

    dtrain's parameter server takes each worker's gradient of its part of the batch as an update of
    its own. This lesson has 3 ranks: 1 server and 2 workers. All runs have 8 steps.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "sent",
            "How much does a rank of `local_sgd` with `sync_every=4` send in a step, on average?",
            answer=lesson.FLOAT * lesson.parameters() / 4 / KIB,
            unit="KiB",
            tolerance=0.02,
            hint="`ddp`'s 471 KiB, once every four steps.",
            because="It is a quarter of `ddp`'s: weights have as many bytes as gradients.",
        ),
        Question(
            "loss",
            "How are the losses of `local_sgd` beside those of `ddp`?",
            answer="not the same",
            choices=(lesson.SAME, "not the same"),
            hint="Between two meetings each rank follows the gradient of its own rows.",
            because="Each rank takes steps of its own. Whether that is better or worse depends on "
            "the model and the rates; it is another training.",
        ),
        Question(
            "updates",
            "8 steps of the parameter server with 2 workers: how many updates do the weights get?",
            answer=16,
            tolerance=0,
            hint="A step is a global batch, which the workers share. Each pushes a gradient of "
            "its part.",
            because="Each of the 8 batches gives 2 gradients, and each gradient is an update.",
        ),
        Question(
            "staleness",
            "How stale is a gradient on average with 2 workers?",
            answer="about 1 update",
            choices=("fresh", "about 1 update", "about 2 updates", "about 8 updates"),
            hint="While one worker computes, the other one pushes. How often?",
            because="It is about W - 1. In a short run it is a little less, since the first "
            "gradient is fresh, and it changes from run to run.",
        ),
    )
    form = lesson.ask(questions)
    mo.vstack([form])
    return form, questions


@app.cell(hide_code=True)
def _(questions):
    lesson.hints(questions)
    return


@app.cell
def trained(form, questions):
    given = lesson.predictions(questions, form)
    ddp = run("strategy=ddp", "launch.nproc=2", "steps=8")
    local = run("strategy=local_sgd", "launch.nproc=2", "strategy.dp.sync_every=4", "steps=8")
    server = run("strategy=parameter_server", "launch.nproc=3", "steps=8")
    lesson.commands(ddp, local, server)
    return ddp, given, local, server


@app.cell
def judged(ddp, given, local, questions, server):
    verdicts = lesson.judge(
        "08_asynchronous",
        questions,
        given,
        {
            "sent": Measured(
                sum(step.get("dp_all_reduce_bytes", 0) for step in local.metrics) / 8 / KIB
            ),
            "loss": Measured(
                lesson.SAME if lesson.apart(ddp, local) < lesson.ROUNDING else "not the same"
            ),
            "updates": Measured(server.metrics[-1]["updates"]),
            "staleness": Measured(
                min(
                    {
                        0: "fresh",
                        1: "about 1 update",
                        2: "about 2 updates",
                        8: "about 8 updates",
                    }.items(),
                    key=lambda each: (abs(each[0] - server.metrics[-1]["staleness"]), -each[0]),
                )[1]
            ),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(ddp, local, server):
    lesson.curves({"ddp": ddp, "local_sgd": local, "parameter_server": server})
    return


@app.cell(hide_code=True)
def _(ddp, local, server):
    mo.md(f"""
    ## What you see

    A gradient was {server.metrics[-1]["staleness"]:.2f} updates old on average.

    The curves part: `local_sgd` by {lesson.apart(ddp, local):.2f} at most, the parameter server by
    {lesson.apart(ddp, server):.2f}. Equal losses prove that a synchronous strategy is right; here
    they cannot. What counts is the loss after a given time, and that depends on how slow the links
    are and how unequal the machines.

    dtrain does not predict these runs' bytes, so that column is empty.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    In mode `sync` the server waits for the gradients of a whole batch: its losses are those of
    `ddp`. How stale are gradients then? In mode `bounded` no worker runs far ahead.
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(["async", "bounded", "sync"], value="sync", label="strategy.dp.mode")
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run(
        "strategy=parameter_server", "launch.nproc=3", "steps=8", f"strategy.dp.mode={option.value}"
    )
    mo.md(
        f"{_own.metrics[-1]['updates']} updates, staleness {_own.metrics[-1]['staleness']:.2f}; "
        f"the loss of step 8 is {_own.losses[-1]:.4f}.\n\n```sh\n{_own.command}\n```"
    )
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
