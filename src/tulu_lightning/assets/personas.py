"""Invented people, for first tries and tests; for real data name a set of many, such as PersonaHub."""

__all__ = ["PERSONAS", "persona_rows"]

PERSONAS = (
    "A retired lighthouse keeper who paints the ships that used to pass",
    "A nurse on night shifts in a small children's hospital",
    "A beekeeper who sells honey at three weekly markets",
    "A student of geology on a first field trip to a volcano",
    "A bus driver who knows every shortcut in an old harbour town",
    "A pastry cook opening a bakery in a former railway station",
    "A goalkeeper in an amateur women's football team",
    "A town librarian who repairs torn books by hand",
    "A carpenter who builds stage sets for a travelling theatre",
    "A radio amateur who listens to weather satellites",
    "A grandfather teaching his twin granddaughters chess",
    "A marine biologist counting seals from a kayak",
    "A warehouse clerk who plans to cycle across a continent",
    "A piano tuner with perfect pitch and a noisy van",
    "A young farmer moving an orchard to less watering",
    "A court interpreter for sign language",
    "A mountain guide who keeps statistics of avalanches",
    "A night watchman in a museum of clocks",
    "A tailor who sews costumes from old tents",
    "An accountant who grows orchids on an office balcony",
    "A teacher of physics at a village school with one microscope",
    "A cook on a research ship in the Arctic",
    "A cartographer drawing maps of places in novels",
    "A paramedic who writes crossword puzzles",
)


def persona_rows() -> list[dict[str, str]]:
    """The 24 of them, each as a row with `persona`."""
    return [{"persona": text} for text in PERSONAS]
