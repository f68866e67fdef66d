import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="7. Experts")

with app.setup:
    import lesson
    import marimo as mo
    from lesson import KIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 7. Experts

    A mixture of experts has several feed-forward layers in each block, the **experts**. A router
    sends each token to the best `top_k` of them. So a model has many parameters, and a token uses
    few.

    Expert parallelism (`strategy=expert`) gives each rank some of the experts. Rows are divided as
    in data parallelism, and tokens travel to their experts and back.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What there is

    This lesson trains `tiny` with 4 experts in each of its 2 blocks, on two ranks.

    * Without experts the model has 120,576 parameters. Of these each block's feed-forward layer has
      $2 \cdot 64 \cdot 256 + 256 + 64$ = 33,088, biases included.
    * An expert has two matrices, $2 \cdot 64 \cdot 256$ = 32,768 parameters, and no biases. The
      router of a block has $4 \cdot 64$ = 256.

    A rank has 2 rows of 64 tokens. Each token goes to `top_k` = 2 experts, as a vector of 64
    numbers. It goes there and comes back, in the forward pass and in the backward pass. On two
    ranks half of the experts are on the other one.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "total",
            "How many parameters has the model with 4 experts in each of its 2 blocks?",
            answer=lesson.parameters() + 2 * (4 * 32_768 + 256 - 33_088),
            tolerance=0.02,
            hint="In each block take away the feed-forward layer; add four experts and a router.",
            because="It is 120,576 + 2 × (4 × 32,768 + 256 - 33,088) = 317,056.",
        ),
        Question(
            "held",
            "How much do the parameters take on each of two ranks?",
            answer=4 * (lesson.parameters() + 2 * (2 * 32_768 + 256 - 33_088)) / KIB,
            unit="KiB",
            tolerance=0.02,
            hint="A rank holds 2 of the 4 experts of each block, and all else; 4 bytes each.",
            because="Experts are divided; attention, embeddings and routers are on every rank.",
        ),
        Question(
            "sent",
            "How much leaves a rank in a step with the tokens, as the mean over both ranks?",
            answer=2 * 128 * 64 * 4 * 4 * 2 / 2 / KIB,
            unit="KiB",
            hint="2 experts × 128 tokens × 64 numbers × 4 bytes, 4 times a block (there and back, "
            "forward and backward), 2 blocks. Half of it leaves the rank.",
            because="It is 2 × 128 × 64 × 4 bytes × 4 × 2, and half of that crosses.",
        ),
        Question(
            "alike",
            "Do both ranks send the same number of bytes in a step?",
            answer="no, the router decides",
            choices=("yes, always", "no, the router decides"),
            hint="Who decides where a token goes?",
            because="The router sends more tokens to some experts than to others. The busiest "
            "rank sets the pace, so models learn to balance their experts.",
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
    one = run("strategy=single", "model.n_experts=4")
    two = run("strategy=expert", "launch.nproc=2", "model.n_experts=4")
    lesson.commands(one, two)
    return given, one, two


@app.cell
def judged(given, one, questions, two):
    verdicts = lesson.judge(
        "07_experts",
        questions,
        given,
        {
            "total": Measured(
                one.held("parameters") / 4,
                one.held("parameters", predicted=True) / 4,
            ),
            "held": Measured(
                two.held("parameters") / KIB, two.held("parameters", predicted=True) / KIB
            ),
            "sent": Measured(
                sum(two.sent(what="all_to_all", rank=rank) for rank in (0, 1)) / 2 / KIB,
                sum(two.sent(what="all_to_all", rank=rank, predicted=True) for rank in (0, 1))
                / 2
                / KIB,
            ),
            "alike": Measured(
                "yes, always"
                if two.sent(what="all_to_all", rank=0) == two.sent(what="all_to_all", rank=1)
                else "no, the router decides"
            ),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(one, two):
    _runs = {"one process": one, "expert, 2 ranks": two}
    mo.vstack([lesson.bars(_runs), lesson.curves(_runs)])
    return


@app.cell(hide_code=True)
def _(one, two):
    mo.md(f"""
    ## What you see

    Rank 0 sent {two.sent(what="all_to_all", rank=0) / KIB:,.0f} KiB with its tokens, rank 1
    {two.sent(what="all_to_all", rank=1) / KIB:,.0f} KiB. dtrain predicts the mean, as if every
    expert had equally many tokens; nobody can know more before the router has spoken. So
    activations differ from their prediction too, more than in other lessons.

    The losses differ by {lesson.apart(one, two):.1e}: it matters to no token where its expert is.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    Send each token to another number of experts. The parameters stay; what else changes?
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(["1", "2", "3", "4"], value="1", label="model.top_k")
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run(
        "strategy=expert", "launch.nproc=2", "model.n_experts=4", f"model.top_k={option.value}"
    )
    _sent = [_own.sent(what="all_to_all", rank=rank) / KIB for rank in (0, 1)]
    mo.md(
        f"The ranks send {_sent[0]:,.0f} and {_sent[1]:,.0f} KiB with their tokens; the loss of "
        f"step 5 is {_own.losses[-1]:.4f}.\n\n```sh\n{_own.command}\n```"
    )
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
