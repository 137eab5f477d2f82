from itertools import combinations

from qlora_trainer.stages.compare.page.labels import Label, Placed, place_labels

WITHIN = ((0.0, 0.0), (600.0, 400.0))


def meet(first: Placed, second: Placed) -> bool:
    (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = first.box, second.box
    return left < other_right and other_left < right and top < other_bottom and other_top < bottom


def test_a_name_stands_right_of_its_mark_where_there_is_room() -> None:
    (placed,) = place_labels([Label("nf4", (100.0, 50.0))], within=WITHIN)
    assert placed.start[0] > 100
    assert placed.start[1] == 50
    assert not placed.is_far


def test_a_name_at_the_right_edge_stands_left_of_its_mark() -> None:
    (placed,) = place_labels([Label("smoothquant_w8a8", (590.0, 50.0))], within=WITHIN)
    assert placed.box[2] < 590


def test_names_of_marks_at_one_place_do_not_meet_and_those_further_off_have_a_line() -> None:
    labels = [Label(f"method_{number}_int4", (300.0 + number, 200.0 + number)) for number in range(12)]
    placed = place_labels(labels, within=WITHIN)
    assert [each.text for each in placed] == [label.text for label in labels]
    assert not any(meet(first, second) for first, second in combinations(placed, 2))
    assert sum(each.is_far for each in placed) >= 8
    for each in placed:
        assert each.box[0] >= 0
        assert each.box[2] <= 600


def test_no_name_covers_a_mark() -> None:
    labels = [Label("first", (100.0, 50.0)), Label("second", (120.0, 50.0))]
    first, _ = place_labels(labels, within=WITHIN)
    left, top, right, bottom = first.box
    assert not (left < 120 < right and top < 50 < bottom)


def test_where_no_place_is_free_the_name_stands_beside_its_mark_all_the_same() -> None:
    (placed,) = place_labels([Label("nf4", (100.0, 50.0))], within=((0.0, 0.0), (1.0, 1.0)))
    assert placed.start[1] == 50
