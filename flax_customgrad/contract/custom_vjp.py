"""`custom_vjp`: the one way a hand-written gradient enters the library.

The verbs are those of `jax.custom_vjp` and `nnx.custom_vjp`. What is added: the first argument may
be a Module, a State or a dict of parameters; the backward receives the plain cotangent of the
output whatever the mode of NNX; and what it returns is checked while JAX traces it (`cotangents`).

    call      f(module, x, "same")
    arguments       pack: arrays [kernel, bias, x] and, hashable, everything else
    binding         what JAX differentiates, over the arrays
    fwd             unpack, run the user's fwd, pack its residuals
    bwd             unpack the residuals, run the user's bwd, check, one cotangent per array

An operation of the library itself registers as it is decorated (`registry.operations`): the tests
take every registered one through every transform of JAX.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract import autodiff, compat, cotangents, explanations, writes
from flax_customgrad.contract.arguments import PackedTree, Static, pack_tree
from flax_customgrad.contract.binding import Rules, bind
from flax_customgrad.contract.guard import Guard, Updates
from flax_customgrad.contract.promotion import promoting
from flax_customgrad.contract.residual_storage import restore, store
from flax_customgrad.registry import operations

_FORWARD_MODE = (
    "with this JAX a hand-written backward has no forward mode; inside "
    "`with flax_customgrad.use_autodiff():` JAX differentiates the function itself"
)

_NUMBERS = (float, complex)


@overload
def custom_vjp(fun: Callable[..., Any]) -> "CustomVJP": ...
@overload
def custom_vjp(
    *, surrogate: bool = False, leading_axes: bool = False
) -> Callable[[Callable[..., Any]], "CustomVJP"]: ...
def custom_vjp(
    fun: Callable[..., Any] | None = None,
    *,
    surrogate: bool = False,
    leading_axes: bool = False,
    **unknown: Any,
) -> Any:
    """Gives a function of parameters and arrays a backward pass of its own.

    The rules of a backward are on `CustomVJP.defvjp`.

    Args:
        fun: the function. Its first argument may be a Module, an `nnx.State` or a dict of
            parameters; every argument may be an array, a tree of arrays, None, or a hashable
            static value (a number, a string, a frozen dataclass).
        surrogate: the backward is meant to differ from the derivative of `fun`, as that of a
            straight-through estimator does; `use_autodiff` then leaves it in force.
        leading_axes: every array but those of the first argument takes any number of leading
            axes, which the output has too, as inputs of shape (..., features) do. Under `jax.vmap`
            with parameters that all examples share, the mapped axis is then one more of them, and
            the gradient of the parameters one product; else there is one gradient per example,
            and their sum.
        **unknown: refused; it is here for the error that says what to write.

    Returns:
        A `CustomVJP`, called like `fun` once `defvjp` has given it a backward.

    Raises:
        TypeError: `fun` takes keyword-only arguments, for which a backward could return nothing; it
            is a `functools.partial` or a classmethod; or a keyword is unknown, such as
            `nondiff_argnums`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> @fcg.custom_vjp
        ... def linear(m, x):
        ...     return x @ m.kernel + m.bias
        >>> def linear_fwd(m, x):
        ...     return linear(m, x), (m, x)
        >>> def linear_bwd(res, g):
        ...     m, x = res
        ...     m_grad = nnx.State({'kernel': x.T @ g, 'bias': g.sum(0)})
        ...     return m_grad, g @ m.kernel.T
        >>> linear.defvjp(linear_fwd, linear_bwd)
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> grads = nnx.grad(lambda m, x: linear(m, x).sum())(model, jnp.ones((5, 3)))
        >>> grads.bias[...]
        Array([5., 5.], dtype=float32)
    """
    if unknown:
        raise TypeError(
            f"custom_vjp takes no {', '.join(unknown)}: an argument that is hashable and no array "
            "is static by itself. Leave it where it is among the arguments of the function and of "
            "fwd, keep it in the residuals if bwd needs it, and return None for its cotangent"
        )
    if fun is None:
        return functools.partial(CustomVJP, surrogate=surrogate, leading_axes=leading_axes)
    return CustomVJP(fun, surrogate=surrogate, leading_axes=leading_axes)


class CustomVJP:
    """A function with a backward pass of its own; made by `custom_vjp`.

    Attributes:
        fun: the function as it was written, which autodiff differentiates.
        surrogate: whether the backward is meant to differ from the derivative of `fun`.
    """

    def __init__(
        self, fun: Callable[..., Any], surrogate: bool = False, leading_axes: bool = False
    ):
        self._is_static_method = isinstance(fun, staticmethod)
        if isinstance(fun, staticmethod):
            fun = fun.__func__
        if isinstance(fun, classmethod):
            raise TypeError(
                f"custom_vjp takes a function, got the classmethod {fun.__func__.__qualname__}: "
                "write @classmethod above @custom_vjp, and set the rules of method f by "
                "f.__func__.defvjp(fwd, bwd)"
            )
        if isinstance(fun, functools.partial):
            raise TypeError(
                f"custom_vjp takes a function, got a functools.partial of {fun.func!r}: decorate "
                "the function itself, and bind arguments where it is called"
            )
        functools.update_wrapper(self, fun)
        is_own = operations.register(self, fun)
        self.fun = promoting(fun) if is_own else fun
        self.surrogate = surrogate
        self._signature = inspect.signature(fun)
        for parameter in self._signature.parameters.values():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
                raise TypeError(
                    f"custom_vjp: `{self._name}` takes the keyword-only argument "
                    f"`{parameter.name}`, but a backward returns one cotangent per positional "
                    "argument: remove the `*` or `**` from its signature"
                )
        self._fwd: Callable[..., tuple[Any, Any]] | None = None
        self._bwd: Callable[[Any, Any], tuple[Any, ...]] | None = None
        self._running = threading.local()
        self._guard = None if is_own else Guard(self._name, self._primal)
        self._bound = bind(
            Rules(
                self._name,
                self._primal,
                self._forward,
                self._backward,
                is_surrogate=surrogate,
                # What a user's function closes over may differ from call to call.
                is_pure=is_own,
                has_rate=_has_rate,
                shared=_size_of_first if leading_axes else None,
            )
        )

    def defvjp(
        self,
        fwd: Callable[..., tuple[Any, Any]],
        bwd: Callable[[Any, Any], tuple[Any, ...]],
    ) -> None:
        """Sets the forward and the backward rule.

        Args:
            fwd: takes the arguments of the function; returns its output and the residuals, a tree
                of arrays, Modules, States and static values that is kept for `bwd`. It may call
                the decorated function.
            bwd: takes the residuals and the cotangent of the output; returns a tuple with one
                cotangent per argument. For a Module, State or dict that is an `nnx.State` (or
                dict) keyed like its parameters, which names every `nnx.Param` and every other
                Variable that is differentiated; statistics, counters and random state need no
                mention. Of a parameter that a Module holds at several paths the cotangents are
                added. For an array it is the array, for a list, tuple or dataclass the same of
                cotangents; None for zero and for a static value.
                A cotangent has the shape of what it belongs to. One in a wider dtype is cast
                once, a narrower one is an error. Under `shard_map` a gradient that varies over
                the devices is summed for an argument that does not. A `BackwardState` among the
                residuals it may write; its cotangent is None.

        Raises:
            TypeError: `fwd` or `bwd` is not callable, or takes another number of arguments.
        """
        if not callable(fwd) or not callable(bwd):
            raise TypeError(f"defvjp of `{self._name}` takes two functions, fwd and bwd")
        self._check_rules(fwd, bwd)
        own = self._guard is None
        self._fwd, self._bwd = (promoting(fwd), promoting(bwd)) if own else (fwd, bwd)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function; a Variable that it writes, of a Module or by itself, is written.

        Raises:
            TypeError: no backward was given; an argument is neither array nor hashable; a static
                argument has to be known and is traced; the function closes over something that is
                differentiated; or it writes one Variable through two arguments.
        """
        if self._fwd is None:
            raise TypeError(
                f"`{self._name}` has no backward yet: call `{self._name}.defvjp(fwd, bwd)` first"
            )
        args = self._positional(args, kwargs)
        if not self.surrogate and (getattr(self._running, "fwd", False) or autodiff.in_use()):
            # A fwd that calls the decorated function means the plain one, whose derivative is the
            # same. A surrogate's is not: what its fwd returns has the surrogate's derivative too.
            return self.fun(*args)
        arrays, packed = pack_tree(args, f"an argument of {self._name}")
        call = Static(packed)
        if self._guard is not None:
            self._guard.enter(self.fun, call, arrays)
        try:
            out, written = self._bound(call, *arrays)
        except TypeError as error:
            if compat.is_forward_mode_error(error) and not self.surrogate:
                error.add_note(f"{_FORWARD_MODE}: this is `{self._name}`")
            raise
        if written:
            writes.apply(self._name, args, written)
        return out

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Binds like a function, so that a method can carry a backward; `self` comes first."""
        if instance is None or self._is_static_method:
            return self
        return types.MethodType(self, instance)

    # An operation is copied and pickled as a function is: by its name.

    def __copy__(self) -> "CustomVJP":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CustomVJP":
        return self

    def __reduce__(self) -> str:
        return self.fun.__qualname__

    @property
    def _name(self) -> str:
        name = getattr(self.fun, "__qualname__", type(self.fun).__qualname__)
        return name.rpartition("<locals>.")[2]

    def _check_rules(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Refuses rules that cannot be called as they will be."""
        parameters = self._signature.parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return
        for rule, name, expected in (
            (fwd, "fwd", [p.name for p in parameters]),
            (bwd, "bwd", ["residuals", "g"]),
        ):
            try:
                inspect.signature(rule).bind(*expected)
            except TypeError:
                raise TypeError(
                    f"the {name} of `{self._name}` is called with {len(expected)} arguments, "
                    f"({', '.join(expected)}), and {getattr(rule, '__name__', rule)} takes "
                    f"{inspect.signature(rule)}. defvjp takes first fwd, then bwd; of a method, "
                    "decorate the function in the class body, where `self` is an argument"
                ) from None
            except ValueError:
                continue  # it has no signature to look at

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if not kwargs and len(args) == len(self._signature.parameters):
            return args
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"`{self._name}{self._signature}`: {error}") from None
        bound.apply_defaults()
        return bound.args

    def _names(self, args: tuple[Any, ...]) -> tuple[str, ...]:
        """The name of each argument, for messages: `x`, `m: Linear`, `rest[0]`."""
        names: list[str] = []
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}[{i}]" for i in range(len(args) - len(names))]
            else:
                names.append(parameter.name)
        return tuple(
            f"{name}: {type(arg).__name__}" if isinstance(arg, nnx.Module) else name
            for name, arg in zip(names, args, strict=True)
        )

    # What follows is called by the binding, with `call` as its static first argument.

    def _primal(self, call: Static, *arrays: Any) -> tuple[Any, Any]:
        args = call.value.unpack(_read(arrays))
        return self._run(self.fun, call.value, args)

    def _forward(self, call: Static, *arrays: Any) -> tuple[Any, Any]:
        assert self._fwd is not None
        assert self._bwd is not None
        # Where the derivative at a Python number is taken, JAX hands over a number.
        arrays = tuple(jnp.asarray(a) if isinstance(a, _NUMBERS) else a for a in arrays)
        if self._guard is not None:
            self._guard.check_fwd(self._fwd, call, arrays)
        args = call.value.unpack(arrays)
        self._running.fwd = True
        try:
            result, written = self._run(self._fwd, call.value, args)
        except Exception as error:
            error.add_note(explanations.of_fwd(self._name, self._names(args), args))
            raise
        finally:
            self._running.fwd = False
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"the fwd of `{self._name}` returned {cotangents.describe(result)}; expected a "
                "pair, (output, residuals)"
            )
        out, residuals = result
        avals = tuple(map(jax.typeof, arrays))
        arrays_kept, rest = pack_tree(residuals, f"the residuals of {self._name}")
        needed: frozenset[int] = frozenset()
        if self._guard is not None:
            needed = self._guard.compare_fwd(call, arrays, out, written)
            self._guard.check_bwd(self._bwd, call, rest, arrays_kept, out)
        static = Static((call, self._names(args), avals, rest, needed))
        return (out, written), (static, list(map(store, arrays_kept)))

    def _run(
        self, function: Callable[..., Any], packed: PackedTree, args: tuple[Any, ...]
    ) -> tuple[Any, Updates]:
        """Calls the function or its fwd; returns what it returned, and what it wrote."""
        snapshots = writes.snapshots(args) if packed.is_writable else []
        try:
            out = function(*args)
        except Exception as error:
            explained = explanations.of_function(self._name, self._names(args), args, error)
            if explained is None:
                raise
            raise explained from error
        return out, [snapshot.updates(self._name) for snapshot in snapshots]

    def _backward(
        self,
        packed: tuple[Static, list[Any]],
        g: tuple[Any, Any],
        differentiated: tuple[bool, ...] | None,
    ) -> Sequence[Any]:
        assert self._bwd is not None
        static, arrays_kept = packed
        call, names, avals, rest, needed = static.value
        residuals = rest.unpack(list(map(restore, arrays_kept)))
        if self._guard is not None:
            self._guard.check_residuals(rest)
        snapshots = writes.snapshots(residuals) if rest.is_writable else []
        try:
            cts = self._bwd(residuals, g[0])
        except Exception as error:
            explained = explanations.of_backward(self._name, g[0], error)
            if explained is None:
                raise
            raise explained from error
        for snapshot in snapshots:
            snapshot.forbid_updates(self._name)
        args, own = call.value.positions(every_path=True), self._guard is None
        checked, left_out = cotangents.check(
            f"`{self._name}`", names, args, avals, cts, casts_back=own
        )
        if self._guard is not None and differentiated is not None:
            self._guard.check_left_out(left_out, needed, differentiated)
        return checked


def _has_rate(call: Static) -> bool:
    """Whether an argument of a call is a floating number of Python."""
    return any(isinstance(leaf, float) for leaf in call.value.static_leaves)


def _size_of_first(call: Static) -> int:
    """How many of the arrays of a call are those of its first argument."""
    return len(jax.tree.leaves(call.value.positions()[0]))


def _read(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arrays, of which one has waited for what the Refs among them hold.

    A forward that is not differentiated need not read a Ref, and JAX does not compile a function
    with a Ref in it that nothing reads.
    """
    held = [array[...] for array in arrays if isinstance(array, jax.Ref)]
    if not held:
        return arrays
    floats = [
        i
        for i, array in enumerate(arrays)
        if not isinstance(array, jax.Ref) and jnp.issubdtype(array.dtype, jnp.floating)
    ]
    if not floats:
        return arrays
    smallest = min(floats, key=lambda i: arrays[i].size)
    waited, *_ = lax.optimization_barrier((arrays[smallest], *held))
    return (*arrays[:smallest], waited, *arrays[smallest + 1 :])
