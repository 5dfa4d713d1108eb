"""Optimal weights for a given mask, with a certificate. Tensors only."""

from trimfit.refit.auto import Auto as Auto
from trimfit.refit.certificate import Certificate as Certificate
from trimfit.refit.cholesky import Cholesky as Cholesky
from trimfit.refit.conjugate_gradients import ConjugateGradients as ConjugateGradients
from trimfit.refit.gram import FactoredGram as FactoredGram
from trimfit.refit.refinement import RefitSolution as RefitSolution
from trimfit.refit.refinement import Status as Status
from trimfit.refit.refit import refit as refit
from trimfit.refit.solver import Solver as Solver
from trimfit.refit.together import refit_together as refit_together
