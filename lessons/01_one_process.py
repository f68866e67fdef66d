import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="1. One process")

with app.setup:
    import math

    import lesson
    import marimo as mo
    from lesson import KIB, MIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 1. One process

    Before a model is divided, look at what there is to divide. This lesson trains the model `tiny`
    on one process: a Transformer of two blocks, 64 wide, that reads bytes of Python programs and
    predicts the next byte. You predict its loss and its memory; then dtrain trains it for five
    steps and measures both.

    It takes six minutes. Answer first, then press the button. A wrong answer costs nothing, and a
    guess teaches more than none.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What a step needs

    A training step runs the model forward, computes gradients backward, and lets the optimizer
    (Adam) change the weights. Four kinds of tensors are in memory:

    * **parameters**: the weights, 4 bytes each in fp32;
    * **gradients**: as many numbers as there are weights;
    * **optimizer states**: Adam keeps two moments of each gradient;
    * **activations**: what the forward pass keeps for the backward pass. There are more of them the
      more tokens the batch has.

    The batch has 4 rows of 64 bytes. The vocabulary has 256 words, one for each byte.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "loss",
            "What is the loss of the first step, before the model has learned anything?",
            answer=math.log(lesson.VOCABULARY),
            unit="nats",
            hint=r"The loss is $-\ln p$ of the right byte. A model that knows nothing gives each "
            r"of the $V$ bytes about $p = 1/V$.",
            because="Weights begin small and random, so the loss begins near ln 256 = 5.545.",
        ),
        Question(
            "states",
            f"The model has {lesson.parameters():,} parameters. How much memory do "
            "parameters, gradients and Adam's states take together?",
            answer=16 * lesson.parameters() / MIB,
            unit="MiB",
            hint="4 bytes for the weight, 4 for its gradient, 2 × 4 for Adam's moments. "
            "1 MiB is 1,048,576 bytes.",
            because="It is 16 bytes a parameter: 4 + 4 + 8.",
        ),
        Question(
            "largest",
            "Which kind takes the most memory?",
            answer="activations",
            choices=lesson.KINDS,
            hint="This model has few weights. But each of the 256 tokens leaves a dozen vectors "
            "of 64 to 256 numbers in each block, and 256 logits at the end.",
            because="In a small model on a large batch activations lead; in a large model on few "
            "tokens the states of the optimizer do.",
        ),
        Question(
            "double",
            "The batch gets 8 rows instead of 4. By what factor do the activations grow?",
            answer=2,
            hint="Every row leaves its own activations.",
            because="Activations grow with the rows; the other three kinds do not.",
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
    four = run("strategy=single")
    eight = run("strategy=single", "global_batch_size=8")
    lesson.commands(four, eight)
    return eight, four, given


@app.cell
def judged(eight, four, given, questions):
    verdicts = lesson.judge(
        "01_one_process",
        questions,
        given,
        {
            "loss": Measured(four.losses[0]),
            "states": Measured(
                four.held(*lesson.STATES) / MIB, four.held(*lesson.STATES, predicted=True) / MIB
            ),
            "largest": Measured(max(lesson.KINDS, key=four.held)),
            "double": Measured(
                eight.held("activations") / four.held("activations"),
                eight.held("activations", predicted=True)
                / four.held("activations", predicted=True),
            ),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(eight, four):
    mo.vstack([lesson.bars({"4 rows": four, "8 rows": eight}), lesson.curves({"4 rows": four})])
    return


@app.cell(hide_code=True)
def _(four):
    mo.md(f"""
    ## What you see

    Bars are what dtrain measured in the third step, by following every tensor; black lines are what
    it had predicted from the shapes of the model, before any step. Adam's states are a few bytes
    more than 8 a parameter ({four.held("optimizer") - 8 * lesson.parameters():,.0f} bytes here): a
    step count for each tensor.

    The rest of the course divides these bars among ranks. Each way to divide them sends other
    messages.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    Activations need not be kept. With `activation_checkpointing=true` the forward pass keeps what
    enters each block alone, and the backward pass computes the block again. What becomes of the
    activations, and what of the loss?
    """)
    return


@app.cell
def setting():
    option = mo.ui.switch(value=True, label="activation_checkpointing")
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run(f"activation_checkpointing={str(option.value).lower()}")
    mo.md(
        f"Activations take {_own.held('activations') / KIB:,.0f} KiB; the loss of step 5 is "
        f"{_own.losses[-1]:.4f}.\n\n```sh\n{_own.command}\n```"
    )
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
