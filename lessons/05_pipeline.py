import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="5. Pipeline and its bubble")

with app.setup:
    import lesson
    import marimo as mo
    from lesson import KIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 5. Pipeline and its bubble

    A pipeline gives each rank some consecutive blocks, a **stage**. The batch is cut into
    **micro-batches**, which flow through the stages: while stage 1 works on the first micro-batch,
    stage 0 works on the second. Only the activations at the cut travel.

    At the beginning the last stage has nothing to do, and at the end the first one. That idle time
    is the **bubble**.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## How large it is

    With $p$ stages and $m$ micro-batches, each of which takes the same time on each stage, a rank
    works for $m$ turns and idles for $p - 1$:

    $$\text{bubble} = \frac{p-1}{m+p-1}.$$

    `gpipe` runs all forward passes, then all backward passes: it holds the activations of all $m$
    micro-batches. `1f1b` begins with a backward pass as soon as it can: it holds at most $p$ of
    them.

    You predict for two stages and a batch of 8 rows.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "bubble2",
            "How large is the bubble with 2 micro-batches?",
            answer=100 / 3,
            unit="%",
            hint=r"$(p-1)/(m+p-1)$ with $p = 2$, $m = 2$.",
            because="One turn of three is idle.",
        ),
        Question(
            "bubble8",
            "And with 8 micro-batches?",
            answer=100 / 9,
            unit="%",
            hint=r"$p = 2$, $m = 8$.",
            because="One turn of nine is idle. More micro-batches shrink the bubble, until each "
            "is too small to compute well.",
        ),
        Question(
            "memory",
            "8 micro-batches: what share of `gpipe`'s activations does the first stage hold under "
            "`1f1b`?",
            answer=2 / 8,
            hint="At most $p = 2$ micro-batches are under way, instead of all 8.",
            because="It holds two micro-batches instead of eight: p/m.",
            tolerance=0.08,
        ),
        Question(
            "sent",
            "How much does the first stage send in a step? (It sends the activations of 8 rows, "
            "and once the gradient of the matrix that embedding and head share.)",
            answer=(8 * lesson.TOKENS * lesson.WIDTH + lesson.VOCABULARY * lesson.WIDTH) * 4 / KIB,
            unit="KiB",
            hint="8 rows × 64 tokens × 64 numbers × 4 bytes, and 256 × 64 numbers of the shared "
            "matrix.",
            because="It is 128 KiB of activations and 64 KiB of the shared matrix, however many "
            "micro-batches there are.",
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

    def piped(schedule, micro_batches):
        return run(
            "strategy=pipeline",
            "launch.nproc=2",
            "global_batch_size=8",
            f"strategy.pp.schedule={schedule}",
            f"strategy.pp.micro_batches={micro_batches}",
        )

    gpipe2 = piped("gpipe", 2)
    gpipe8 = piped("gpipe", 8)
    one_f_one_b = piped("1f1b", 8)
    lesson.commands(gpipe2, gpipe8, one_f_one_b)
    return given, gpipe2, gpipe8, one_f_one_b


@app.cell
def judged(given, gpipe2, gpipe8, one_f_one_b, questions):
    verdicts = lesson.judge(
        "05_pipeline",
        questions,
        given,
        {
            "bubble2": Measured(100 * gpipe2.bubble["theory"], by="by the schedule"),
            "bubble8": Measured(100 * gpipe8.bubble["theory"], by="by the schedule"),
            "memory": Measured(
                one_f_one_b.held("activations") / gpipe8.held("activations"),
                one_f_one_b.held("activations", predicted=True)
                / gpipe8.held("activations", predicted=True),
            ),
            "sent": Measured(one_f_one_b.sent() / KIB, one_f_one_b.sent(predicted=True) / KIB),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(gpipe8, one_f_one_b):
    mo.vstack(
        [
            mo.md("A step of `gpipe`, 8 micro-batches:"),
            lesson.picture(gpipe8.gantt),
            mo.md("A step of `1f1b`, 8 micro-batches:"),
            lesson.picture(one_f_one_b.gantt),
        ]
    )
    return


@app.cell(hide_code=True)
def _(gpipe2, gpipe8, one_f_one_b):
    mo.md(f"""
    ## What you see

    The bubbles that were graded are not measured. They are those of the schedule: dtrain walks the
    list of what each rank does, turn by turn. The clock said
    {100 * gpipe2.bubble["measured"]:.0f} % with 2 micro-batches and
    {100 * gpipe8.bubble["measured"]:.0f} % with 8. That is more, because a pass of this tiny model
    takes a millisecond, and the ranks spend most of a step with messages, and waiting for a core.
    `make bench-bubble` measures it with a model whose passes are long.

    The losses of `gpipe` and `1f1b` differ by {lesson.apart(gpipe8, one_f_one_b):.1e}.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    Other schedules give each rank two stages (here with a model of 4 blocks), or fill the bubble
    with the gradients of the weights. What does each leave?
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(
        ["gpipe", "1f1b", "interleaved_1f1b", "zbv"], value="zbv", label="strategy.pp.schedule"
    )
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run(
        "strategy=pipeline",
        "launch.nproc=2",
        "global_batch_size=8",
        "model.n_layers=4",
        "strategy.pp.micro_batches=8",
        f"strategy.pp.schedule={option.value}",
    )
    mo.vstack(
        [
            mo.md(
                f"The schedule leaves {100 * _own.bubble['theory']:.1f} % idle, and the first rank "
                f"sends {_own.sent() / KIB:,.0f} KiB.\n\n```sh\n{_own.command}\n```"
            ),
            lesson.picture(_own.gantt),
        ]
    )
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
