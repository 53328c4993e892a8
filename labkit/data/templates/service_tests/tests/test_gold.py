"""Does the model still give the right answers? A share, not each one: a model is not a function with one bug."""


def test_enough_gold_answers_are_right(live, call, gold):
    wrong = {}
    for one in gold["requests"]:
        status, reply, _ = call(live, "/command", {"text": one["text"]})
        if status != 200 or reply["command"] != one["command"]:
            wrong[one["text"]] = reply
    share = 1 - len(wrong) / len(gold["requests"])
    assert share >= gold["at_least"], f"{share:.0%} right, expected {gold['at_least']:.0%}; wrong: {wrong}"
