import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="4. Tensor parallel")

with app.setup:
    import lesson
    import marimo as mo
    from lesson import KIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 4. Tensor parallel

    Data parallelism divides the batch. Tensor parallelism divides each matrix: a rank computes its
    slice of the heads, of the hidden units and of the vocabulary, for **all** rows. This is
    `strategy=tensor` (Megatron-LM).

    In each half of a block the first matrix is cut by columns and the second by rows, so that the
    ranks must meet only once: their results are added by an all-reduce.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What travels

    Now activations travel, not gradients. Between layers an activation has rows × tokens × width
    numbers: here 4 × 64 × 64 numbers of 4 bytes, $A$ = 64 KiB. A step has

    * 2 all-reduces of $A$ a block in the forward pass (attention, feed-forward layer), and 2 in the
      backward pass;
    * 2 more for the embedding and the head;
    * 3 small ones for the loss, of a number a token.

    On two ranks an all-reduce sends as many bytes as it adds. The model has 2 blocks.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "sent",
            "How much does each of two ranks send in a step?",
            answer=(4 * lesson.BLOCKS + 2) * lesson.ROWS * lesson.TOKENS * lesson.WIDTH * 4 / KIB,
            unit="KiB",
            hint=r"$(4 L + 2) \cdot A$ with $L = 2$ blocks; the loss adds half a percent.",
            because="It is (4 × 2 + 2) × 64 KiB, and 3 KiB for the loss.",
        ),
        Question(
            "double",
            "The batch gets 8 rows instead of 4. By what factor does that grow?",
            answer=2,
            hint="What travels are activations.",
            because="Activations grow with the batch. What `tensor` sends does not depend on the "
            "size of the vocabulary, but on rows, tokens and width.",
        ),
        Question(
            "ddp",
            "And by what factor does that grow which a rank of `ddp` sends?",
            answer=1,
            hint="`ddp` sends gradients, one for each parameter.",
            because="`ddp` sends one gradient for each parameter, however many rows there are.",
        ),
        Question(
            "weights",
            "What share of the parameters does each of two ranks hold?",
            answer=0.5,
            hint="All matrices are cut. A few vectors (norms, some biases) and the positions are "
            "not.",
            because="It is a little more than a half: norms, positions and the biases after an "
            "all-reduce are on both ranks.",
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
    two = ("launch.nproc=2",)
    tensor = run("strategy=tensor", *two)
    tensor8 = run("strategy=tensor", *two, "global_batch_size=8")
    ddp = run("strategy=ddp", *two)
    ddp8 = run("strategy=ddp", *two, "global_batch_size=8")
    lesson.commands(tensor, tensor8, ddp, ddp8)
    return ddp, ddp8, given, tensor, tensor8


@app.cell
def judged(ddp, ddp8, given, questions, tensor, tensor8):
    verdicts = lesson.judge(
        "04_tensor",
        questions,
        given,
        {
            "sent": Measured(tensor.sent() / KIB, tensor.sent(predicted=True) / KIB),
            "double": Measured(
                tensor8.sent() / tensor.sent(),
                tensor8.sent(predicted=True) / tensor.sent(predicted=True),
            ),
            "ddp": Measured(
                ddp8.sent() / ddp.sent(), ddp8.sent(predicted=True) / ddp.sent(predicted=True)
            ),
            "weights": Measured(
                tensor.held("parameters") / ddp.held("parameters"),
                tensor.held("parameters", predicted=True) / ddp.held("parameters", predicted=True),
            ),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(ddp, tensor):
    _runs = {"ddp": ddp, "tensor": tensor}
    mo.vstack([lesson.bars(_runs), lesson.curves(_runs)])
    return


@app.cell(hide_code=True)
def _(ddp, tensor):
    mo.md(f"""
    ## What you see

    The curves are equal: the greatest difference is {lesson.apart(ddp, tensor):.1e}. Look at the
    activations: `tensor` holds those of all rows, and only what lies within a divided layer is
    divided, so it holds more than `ddp`.

    `tensor` sends {tensor.calls()} messages a step, and the ranks wait in each of them. So it
    belongs where links are fast: between the GPUs of one machine.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    With sequence parallelism what lies between the layers is divided too, by tokens. Each
    all-reduce becomes an all-gather and a reduce-scatter. What becomes of the bytes, what of the
    activations?
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(["true", "false"], value="true", label="strategy.tp.sequence_parallel")
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run("strategy=tensor", "launch.nproc=2", f"strategy.tp.sequence_parallel={option.value}")
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
