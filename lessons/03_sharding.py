import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="3. Sharding")

with app.setup:
    import lesson
    import marimo as mo
    from lesson import KIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 3. Sharding

    Under `ddp` every rank holds the same parameters, gradients and states of the optimizer. ZeRO
    ("zero redundancy") cuts them into slices instead. This lesson compares `ddp` with two steps of
    it, on two ranks:

    * `zero1`: the states of the optimizer are divided. Each rank updates its share of the weights
      and sends the new weights to the others.
    * `fsdp`: parameters, gradients and states are divided. A block's parameters are gathered when
      the block runs, and dropped afterwards.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What travels

    An all-gather and a reduce-scatter are each one half of an all-reduce: on a ring each sends
    $\frac{n-1}{n}$ of the bytes. `fsdp` gathers the parameters before forward and once more before
    backward, and reduce-scatters the gradients.

    A parameter takes $4 + 4 + 8$ bytes: itself, its gradient, Adam's two moments. The model has
    120,576 of them, so one process holds 1,884 KiB of these three kinds.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "fsdp",
            "How much do parameters, gradients and states take together on each of two ranks of "
            "`fsdp`?",
            answer=16 * lesson.parameters() / 2 / KIB,
            unit="KiB",
            tolerance=0.02,
            hint="All three kinds are divided by the number of ranks.",
            because="fsdp divides all three: 16/n bytes a parameter.",
        ),
        Question(
            "zero1",
            "And on each of two ranks of `zero1`?",
            answer=(4 + 4 + 8 / 2) * lesson.parameters() / KIB,
            unit="KiB",
            hint="Only the 8 bytes of Adam's moments are divided.",
            because="It is 4 + 4 + 8/n bytes a parameter. Shares differ a little, since `zero1` "
            "gives out whole tensors.",
        ),
        Question(
            "sent",
            "How many times as many bytes as under `ddp` does a rank of `fsdp` send?",
            answer=1.5,
            hint="`ddp`: two halves of an all-reduce. `fsdp`: two all-gathers and a "
            "reduce-scatter.",
            because="There are three half all-reduces instead of two. That is the price of the "
            "memory.",
        ),
        Question(
            "kept",
            "Which kind takes as much memory under `fsdp` as under `ddp`?",
            answer="activations",
            choices=lesson.KINDS,
            hint="Both divide the rows of a batch.",
            because="Activations follow the rows, which both divide. Only what `ddp` has on every "
            "rank can be saved.",
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
    ddp = run("strategy=ddp", "launch.nproc=2")
    zero1 = run("strategy=zero1", "launch.nproc=2")
    fsdp = run("strategy=fsdp", "launch.nproc=2")
    lesson.commands(ddp, zero1, fsdp)
    return ddp, fsdp, given, zero1


@app.cell
def judged(ddp, fsdp, given, questions, zero1):
    verdicts = lesson.judge(
        "03_sharding",
        questions,
        given,
        {
            "fsdp": Measured(
                fsdp.held(*lesson.STATES) / KIB, fsdp.held(*lesson.STATES, predicted=True) / KIB
            ),
            "zero1": Measured(
                zero1.held(*lesson.STATES) / KIB, zero1.held(*lesson.STATES, predicted=True) / KIB
            ),
            "sent": Measured(
                fsdp.sent() / ddp.sent(), fsdp.sent(predicted=True) / ddp.sent(predicted=True)
            ),
            "kept": Measured(max(lesson.KINDS, key=lambda kind: fsdp.held(kind) / ddp.held(kind))),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(ddp, fsdp, zero1):
    _runs = {"ddp": ddp, "zero1": zero1, "fsdp": fsdp}
    mo.vstack([lesson.bars(_runs), lesson.curves(_runs)])
    return


@app.cell(hide_code=True)
def _(ddp, fsdp):
    mo.md(f"""
    ## What you see

    The curves are equal: the greatest difference between `ddp` and `fsdp` is
    {lesson.apart(ddp, fsdp):.1e}. Sharding moves tensors; it does not change what is computed.

    With n ranks `fsdp` holds 16/n bytes a parameter, so a model that does not fit on 8 ranks may
    fit on 64. `fsdp` also holds the gathered parameters of the block that runs, which are not in
    these bars.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    With `strategy.fsdp.reshard_after_forward=false` the parameters that forward has gathered stay
    until backward (ZeRO-2). How many bytes travel now?
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(
        ["true", "false"], value="false", label="strategy.fsdp.reshard_after_forward"
    )
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run(
        "strategy=fsdp", "launch.nproc=2", f"strategy.fsdp.reshard_after_forward={option.value}"
    )
    mo.md(f"Each rank sends {_own.sent() / KIB:,.0f} KiB a step.\n\n```sh\n{_own.command}\n```")
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
