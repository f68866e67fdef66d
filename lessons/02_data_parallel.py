import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="2. Data parallel")

with app.setup:
    import lesson
    import marimo as mo
    from lesson import KIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 2. Data parallel

    Two ranks hold the same model. Each takes half of the rows of a batch, computes the gradient of
    its half, and then the ranks add their gradients, so that both take the same step. This is
    `strategy=ddp`, the oldest and the simplest way to use several processes.

    You predict what becomes of the loss, of the memory, and how many bytes travel.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## An all-reduce on a ring

    To add their gradients the ranks run an **all-reduce**. On a ring of $n$ ranks each gradient is
    cut into $n$ parts. In $n-1$ hops the parts are added on the way round (reduce-scatter), in
    another $n-1$ hops the sums go round (all-gather). Each hop carries $1/n$ of the bytes, so a
    rank sends

    $$2 \cdot \frac{n-1}{n} \cdot \text{bytes of the gradients.}$$

    The model has 120,576 parameters, each with a gradient of 4 bytes: 471 KiB.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "loss",
            "Two ranks train on the same batches as one process. How is the loss of the last step, "
            "beside that of one process?",
            answer=lesson.SAME,
            choices=(lesson.SAME, lesson.LOWER, lesson.HIGHER),
            hint="The sum of the two halves' gradients is the gradient of the whole batch.",
            because="Both halves together are the same batch, and sums may be divided.",
        ),
        Question(
            "two",
            "How much does each of two ranks send in a step?",
            answer=2 * (2 - 1) / 2 * lesson.FLOAT * lesson.parameters() / KIB,
            unit="KiB",
            tolerance=0.02,
            hint=r"$2 (n-1)/n$ is 1 for two ranks.",
            because="With n = 2 the factor 2 (n-1)/n is 1: as many bytes as the gradients have.",
        ),
        Question(
            "four",
            "And each of four ranks?",
            answer=2 * (4 - 1) / 4 * lesson.FLOAT * lesson.parameters() / KIB,
            unit="KiB",
            tolerance=0.02,
            hint=r"$2 (n-1)/n$ is 1.5 for four ranks, and never more than 2.",
            because="The factor is 1.5 for n = 4 and stays below 2 for any number of ranks. The "
            "batch does not matter.",
        ),
        Question(
            "activations",
            "What share of one process's activations does each of two ranks hold?",
            answer=0.5,
            hint="Activations belong to rows.",
            because="Rows are divided, so activations are. Parameters, gradients and states are "
            "not.",
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
    one = run("strategy=single")
    two = run("strategy=ddp", "launch.nproc=2")
    four = run("strategy=ddp", "launch.nproc=4")
    lesson.commands(one, two, four)
    return four, given, one, two


@app.cell
def judged(four, given, one, questions, two):
    verdicts = lesson.judge(
        "02_data_parallel",
        questions,
        given,
        {
            "loss": Measured(lesson.compared(one, two)),
            "two": Measured(two.sent() / KIB, two.sent(predicted=True) / KIB),
            "four": Measured(four.sent() / KIB, four.sent(predicted=True) / KIB),
            "activations": Measured(
                two.held("activations") / one.held("activations"),
                two.held("activations", predicted=True) / one.held("activations", predicted=True),
            ),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(four, one, two):
    _runs = {"one process": one, "ddp, 2 ranks": two, "ddp, 4 ranks": four}
    mo.vstack([lesson.curves(_runs), lesson.bars(_runs)])
    return


@app.cell(hide_code=True)
def _(one, two):
    mo.md(f"""
    ## What you see

    The three curves lie on each other; the greatest difference between one process and two ranks is
    {lesson.apart(one, two):.1e}, which is the rounding of fp32. That is the test that every
    synchronous strategy has to pass.

    The bars show what data parallelism does not save: each rank still holds all parameters, all
    gradients and all states of the optimizer. The next lesson divides those.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    Give the batch more rows. Which figure changes, which does not?
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(["4", "8", "16"], value="16", label="global_batch_size")
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run("strategy=ddp", "launch.nproc=2", f"global_batch_size={option.value}")
    mo.md(
        f"Each rank sends {_own.sent() / KIB:,.0f} KiB a step and holds "
        f"{_own.held('activations') / KIB:,.0f} KiB of activations.\n\n```sh\n{_own.command}\n```"
    )
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
