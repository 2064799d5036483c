from __future__ import annotations

import numpy as np
import pytest

import broken_networks as broken
from fewbit.doctor.calibration_study import counts_up_to, study_calibration
from fewbit.doctor.diagnose import Images
from fewbit.doctor.records import CalibrationStudy, StudyPoint
from fewbit.errors import DataError
from fewbit.measure.accuracy import Accuracy
from fewbit.recipe import read_recipe


@pytest.mark.parametrize(("most", "last", "count"), [(1, 1, 1), (63, 32, 6), (64, 64, 7), (5000, 1024, 11)])
def test_counts_double_up_to_what_there_is(most: int, last: int, count: int) -> None:
    found = counts_up_to(most)
    assert (found[0], found[-1], len(found)) == (1, last, count)


def images() -> tuple[broken.Patient, Images]:
    patient = broken.bright_spots()
    return patient, patient.images()


def test_few_images_miss_the_bright_spots() -> None:
    """One image has one of four levels of brightness, so what is brighter is cut off; all four are enough."""
    patient, seen = images()
    study = study_calibration(
        patient.net, read_recipe("int8"), seen.calibration, seen.judging.first(64), seeds=(0, 1, 2, 3)
    )
    assert [point.images for point in study.points] == [1, 2, 4, 8, 16, 32, 64]
    assert (study.images, study.pool, study.recipe) == (64, 64, "int8")
    assert study.points[0].low < 0.6
    assert all(point.low == point.mean == point.high == 1.0 for point in study.points[2:])
    assert study.enough() == 4
    assert all(len(point.accuracies) == len(point.agreements) == 4 for point in study.points)
    assert study.method.startswith("torch")


def test_the_smaller_choices_are_the_beginning_of_the_larger_ones_and_seeds_repeat() -> None:
    patient, seen = images()
    few = seen.calibration.first(8)
    one, other = (
        study_calibration(patient.net, read_recipe("int8"), few, seen.judging.first(32), seeds=(5,))
        for _ in range(2)
    )
    assert one == other
    longer = study_calibration(patient.net, read_recipe("int8"), few, seen.judging.first(32), seeds=(5, 6))
    for point, more in zip(one.points, longer.points, strict=True):
        assert point.accuracies[0] == more.accuracies[0]


def test_a_recipe_without_images_is_told() -> None:
    patient, seen = images()
    with pytest.raises(DataError, match="recipe 'int8-weights-only': uses no images, so their number cannot"):
        study_calibration(patient.net, read_recipe("int8-weights-only"), seen.calibration, seen.judging)


def test_no_image_to_calibrate_with_is_told() -> None:
    patient, seen = images()
    none = seen.calibration.subset(np.zeros(0, np.int64))
    with pytest.raises(DataError, match="calibration study: no image is left to calibrate with; give more"):
        study_calibration(patient.net, read_recipe("int8"), none, seen.judging)


def study(*levels: tuple[int, ...]) -> CalibrationStudy:
    """Return a study of 1000 images by how many are right, a tuple a point."""
    points = tuple(
        StudyPoint(
            images=2**place,
            accuracies=tuple(Accuracy(top1_correct=n, top5_correct=n, total=1000) for n in right),
            agreements=(0.99,) * len(right),
        )
        for place, right in enumerate(levels)
    )
    seen = Accuracy(top1_correct=900, top5_correct=990, total=1000)
    return CalibrationStudy(
        recipe="int8", method="", images=1000, pool=64, seeds=(0, 1), float_accuracy=seen, points=points
    )


def test_how_many_are_enough() -> None:
    found = study((500, 900), (880, 900), (893, 899), (896, 900))
    assert found.noise == pytest.approx(1.96 * np.sqrt(0.01 / 1000))
    assert found.enough() == 4  # 893 is within 0.6 points of 898
    assert study((896, 900)).enough() == 1
    assert (found.points[0].mean, found.points[0].low, found.points[0].high) == (0.7, 0.5, 0.9)
