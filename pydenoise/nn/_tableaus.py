"""Runge-Kutta methods of a fixed step as data: Butcher's tableau, and Nystroem's form of it for z'' = f(z, z').

Source: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I" (1993), II.1 and II.14.
"""

from dataclasses import dataclass
from functools import cached_property

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """An explicit method: stage i evaluates f at ``h + step * sum(a[i][j] k[j])``, the step ends at ``sum(b[j] k[j])``.

    ``order`` is that of the error over a fixed time, in the step.
    """

    a: tuple[Row, ...]
    b: Row
    order: int

    @cached_property
    def c(self) -> Row:
        """When, in parts of the step, each stage evaluates f."""
        return tuple(sum(row) for row in self.a)

    @cached_property
    def position_a(self) -> tuple[Row, ...]:
        """Of z where slopes are accelerations: the square of ``a``; ``step * c * v`` comes on top."""
        return tuple(self._through_stages(row) for row in self.a)

    @cached_property
    def position_b(self) -> Row:
        return self._through_stages(self.b)

    def _through_stages(self, row: Row) -> Row:
        """``row`` times ``a``: what each stage's slope gets of the stages before it."""
        count = len(row)
        return tuple(
            sum(row[i] * self.a[i][j] for i in range(count) if j < len(self.a[i])) for j in range(max(count, 0))
        )


TABLEAUS = {
    "euler": Tableau(((),), (1.0,), 1),
    "midpoint": Tableau(((), (1 / 2,)), (0.0, 1.0), 2),
    "heun": Tableau(((), (1.0,)), (1 / 2, 1 / 2), 2),
    "rk4": Tableau(((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
    "rk4_38": Tableau(((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4),
}
