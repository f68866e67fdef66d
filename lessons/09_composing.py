import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="9. Composing")

with app.setup:
    import lesson
    import marimo as mo
    from lesson import KIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 9. Composing

    Strategies live on axes of a **mesh** of ranks, and so they compose. Four ranks can be 2 × 2:
    along one axis (`fsdp`) weights are sharded and rows are divided, along the other (`tp`)
    matrices are divided.

    dtrain says it with `strategy=[fsdp,tensor]`, or `strategy=fsdp_tensor`. The last axis changes
    fastest, so ranks 0 and 1 are neighbours along `tp`:

    | | tp 0 | tp 1 |
    |---|---|---|
    | **fsdp 0** | rank 0 | rank 1 |
    | **fsdp 1** | rank 2 | rank 3 |
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What you need from the lessons before

    * Parameters, gradients and Adam's states take 16 bytes a parameter, 120,576 parameters.
    * `tensor` all-reduces $(4 L + 2) \cdot A$ bytes on two ranks, where $A$ are the bytes of the
      rows that **these ranks** have: the rows of the batch (4) are divided along `fsdp`. $L = 2$; a
      row has 64 × 64 numbers of 4 bytes between layers.
    * `fsdp` sends $3 \frac{n-1}{n}$ times the bytes of the parameters that **its group** has: here
      half of the model, since `tp` has divided it already.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "held",
            "How much do parameters, gradients and states take on each of the four ranks?",
            answer=16 * lesson.parameters() / 4 / KIB,
            unit="KiB",
            tolerance=0.08,
            hint="1,884 KiB, divided along both axes.",
            because="It is about a quarter. What `tensor` does not cut (norms, positions) is "
            "sharded along `fsdp` alone.",
        ),
        Question(
            "tp",
            "How much does a rank send along `tp` in a step?",
            answer=(4 * lesson.BLOCKS + 2) * 2 * lesson.TOKENS * lesson.WIDTH * 4 / KIB,
            unit="KiB",
            hint="10 all-reduces of the activations of 2 rows, 32 KiB.",
            because="Rows are divided along `fsdp`, so it is half of what `tensor` alone sends.",
        ),
        Question(
            "fsdp",
            "How much does a rank send along `fsdp` in a step?",
            answer=3 * (2 - 1) / 2 * lesson.FLOAT * lesson.parameters() / 2 / KIB,
            unit="KiB",
            tolerance=0.08,
            hint=r"$3 \cdot \frac{1}{2}$ times the bytes of half of the parameters, 235.5 KiB.",
            because="Matrices are divided along `tp`, so it is about half of what `fsdp` alone "
            "sends.",
        ),
        Question(
            "loss",
            "How is the loss of the last step, beside that of `ddp` on four ranks?",
            answer=lesson.SAME,
            choices=(lesson.SAME, lesson.LOWER, lesson.HIGHER),
            hint="Each of the two strategies computes what one process would.",
            because="Strategies that each change nothing change nothing together, if they are "
            "applied in the right order.",
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
    ddp = run("strategy=ddp", "launch.nproc=4")
    both = run("strategy=[fsdp,tensor]", "launch.nproc=4", "strategy.tp.degree=2")
    lesson.commands(ddp, both)
    return both, ddp, given


@app.cell
def judged(both, ddp, given, questions):
    verdicts = lesson.judge(
        "09_composing",
        questions,
        given,
        {
            "held": Measured(
                both.held(*lesson.STATES) / KIB, both.held(*lesson.STATES, predicted=True) / KIB
            ),
            "tp": Measured(both.sent("tp") / KIB, both.sent("tp", predicted=True) / KIB),
            "fsdp": Measured(both.sent("fsdp") / KIB, both.sent("fsdp", predicted=True) / KIB),
            "loss": Measured(lesson.compared(ddp, both)),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(both, ddp):
    _runs = {"ddp, 4 ranks": ddp, "fsdp x tensor, 2 x 2": both}
    mo.vstack([lesson.bars(_runs), lesson.curves(_runs)])
    return


@app.cell(hide_code=True)
def _(both, ddp):
    mo.md(f"""
    ## What you see

    The greatest difference between the two curves is {lesson.apart(ddp, both):.1e}. A rank of `ddp`
    sends {ddp.sent() / KIB:,.0f} KiB a step; here it sends {both.sent("tp") / KIB:,.0f} KiB along
    `tp` and {both.sent("fsdp") / KIB:,.0f} KiB along `fsdp`. Put the axis that sends most, and
    waits most, on the fastest links: `tp` within a machine, `fsdp` between machines.

    Whoever plans a run chooses the mesh by such sums. `docs/how-to-choose.md` has a table of them.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    Choose another plan for four ranks. Predict its bytes before you run it.
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(
        {
            "hsdp: replicate x fsdp": "strategy=[replicate,fsdp] strategy.fsdp.degree=2",
            "pipeline x fsdp": "strategy=[pipeline,fsdp] strategy.pp.degree=2",
            "replicate x tensor": "strategy=[replicate,tensor] strategy.tp.degree=2",
            "fsdp x context": "strategy=[fsdp,context] strategy.cp.degree=2",
        },
        value="hsdp: replicate x fsdp",
        label="plan",
    )
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run("launch.nproc=4", *option.value.split())
    _sent = ", ".join(
        f"{_own.sent(axis) / KIB:,.0f} KiB along {axis}" for axis in _own.summary["mesh"]
    )
    mo.md(
        f"A rank sends {_sent}; it holds {_own.held(*lesson.STATES) / KIB:,.0f} KiB of parameters, "
        f"gradients and states. The loss of step 5 is {_own.losses[-1]:.4f}.\n\n"
        f"```sh\n{_own.command}\n```"
    )
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
