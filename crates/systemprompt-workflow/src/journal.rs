//! The life of one operation, as a pure function from state and transition to state.
//!
//! An operation runs its steps forward in order. A step is *started* (the intent, committed before it acts) and
//! then *done*. When a step gives up, or somebody cancels, the operation unwinds: every step that was started or
//! done and has an undo is undone in reverse order, the failing one included, for its outcome may be unknown.
//! A step may be the *pivot*: once it is done nothing is unwound any more.
//!
//! | phase | transition | becomes |
//! |---|---|---|
//! | Queued, Running | `Start(i)`, i the first step not done | Running; i Started, its attempts counted |
//! | Running | `Done(i)`, i Started | i Done; Succeeded when it was the last |
//! | Running | `Fail(i)`, i Started, no pivot done | Unwinding; Failed when there is nothing to undo |
//! | Running | `Fail(i)`, i Started, a pivot done | Stuck, heading forward |
//! | Queued, Running | `Cancel`, no pivot done | Unwinding; Failed when there is nothing to undo |
//! | Unwinding | `UndoStart(i)`, i the last step to undo | i Undoing, its attempts counted |
//! | Unwinding | `UndoDone(i)`, i Undoing | i Undone; Failed when it was the last to undo |
//! | Unwinding | `UndoFail(i)`, i Undoing | Stuck, heading back |
//! | Queued, Running, Unwinding | `Park` | Stuck: this worker cannot read the operation |
//! | Stuck | `Resume` | Running or Unwinding, attempts counted anew |
//! | Stuck | given up (`give_up_stuck`, by who takes away by name what is left) | Failed |
//!
//! Everything else is an [`IllegalTransition`]. A transient error is no transition: the mark stays Started or
//! Undoing, and the next attempt counts up. Stored in `operations` and `operation_steps`.

use systemprompt_contract::{ApiError, OperationStatus};

/// What the journal has to know of a workflow's steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan(pub Vec<PlannedStep>);

/// One step of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedStep {
    /// Its stored name.
    pub name: String,
    /// There is something to run to take it back.
    pub has_undo: bool,
    /// Nothing is unwound once it is done.
    pub pivot: bool,
}

/// How far one step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Nothing of it can have happened.
    Untouched,
    /// It was tried this often; what happened is unknown.
    Started {
        /// Acts begun.
        attempts: u32,
    },
    /// It happened, and its state is stored.
    Done,
    /// Its undo was tried this often; what is left of it is unknown.
    Undoing {
        /// Undos begun.
        attempts: u32,
    },
    /// Nothing is left of it.
    Undone,
}

/// Where the whole operation is, with what only that phase has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Waits for its first worker.
    Queued,
    /// Steps run forward.
    Running,
    /// Steps are undone.
    Unwinding {
        /// Why.
        failure: ApiError,
    },
    /// All steps are done.
    Succeeded,
    /// All steps that needed it are undone.
    Failed {
        /// Why.
        failure: ApiError,
    },
    /// Parked until an operator resumes it.
    Stuck {
        /// Which way it was going.
        heading: Heading,
        /// What it could not get over.
        because: ApiError,
    },
}

/// Which way a parked operation goes when it is resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heading {
    /// A step behind the pivot gave up.
    Forward,
    /// An undo gave up.
    Back {
        /// Why it unwinds.
        failure: ApiError,
    },
}

/// What can happen to an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transition {
    /// A step is about to act.
    Start(usize),
    /// A step completed.
    Done(usize),
    /// A step gave up.
    Fail(usize, ApiError),
    /// Somebody asked for the end.
    Cancel(ApiError),
    /// A step is about to be undone.
    UndoStart(usize),
    /// A step is undone.
    UndoDone(usize),
    /// An undo gave up.
    UndoFail(usize, ApiError),
    /// The worker cannot read the operation.
    Park(ApiError),
    /// An operator un-parks it.
    Resume,
}

/// What a worker does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Act on this step.
    Act(usize),
    /// Undo this step.
    Undo(usize),
    /// Nothing: it is over or parked.
    Rest,
}

/// A transition that the table does not have: a bug of the engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an operation that is {status} at step {step:?} cannot take {transition}")]
pub struct IllegalTransition {
    status: &'static str,
    step: Option<String>,
    transition: &'static str,
}

/// Stored steps that do not fit the workflow this worker knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the journal has step {position} as {stored:?}, this worker has {known:?}; it was written by another version")]
pub struct PlanMismatch {
    position: usize,
    stored: String,
    known: Option<String>,
}

/// One stored step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredStep {
    /// Index in the workflow's list.
    pub position: usize,
    /// Its name when it was stored.
    pub name: String,
    /// How far it is.
    pub mark: Mark,
}

/// An operation's phase and the marks of its steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journal {
    plan: Plan,
    phase: Phase,
    marks: Vec<Mark>,
}

impl Journal {
    /// A fresh operation.
    pub fn new(plan: Plan) -> Self {
        let marks = vec![Mark::Untouched; plan.0.len()];
        Self { plan, phase: Phase::Queued, marks }
    }

    /// An operation as it was stored.
    ///
    /// # Errors
    /// The stored steps are not those of `plan`.
    pub fn load(plan: Plan, phase: Phase, stored: &[StoredStep]) -> Result<Self, PlanMismatch> {
        let mut journal = Self { phase, ..Self::new(plan) };
        for StoredStep { position, name, mark } in stored {
            let known = journal.plan.0.get(*position).map(|step| step.name.as_str());
            if known != Some(name) {
                return Err(PlanMismatch {
                    position: *position,
                    stored: name.clone(),
                    known: known.map(ToOwned::to_owned),
                });
            }
            journal.marks[*position] = *mark;
        }
        Ok(journal)
    }

    /// Where the operation is.
    pub const fn phase(&self) -> &Phase {
        &self.phase
    }

    /// How far step `index` is.
    pub fn mark(&self, index: usize) -> Mark {
        self.marks.get(index).copied().unwrap_or(Mark::Untouched)
    }

    /// What a worker does next.
    pub fn next(&self) -> Next {
        match self.phase {
            Phase::Queued | Phase::Running => self.first_not_done().map_or(Next::Rest, Next::Act),
            Phase::Unwinding { .. } => self.last_to_undo().map_or(Next::Rest, Next::Undo),
            Phase::Succeeded | Phase::Failed { .. } | Phase::Stuck { .. } => Next::Rest,
        }
    }

    /// A cancellation would still be heard.
    pub fn can_cancel(&self) -> bool {
        matches!(self.phase, Phase::Queued | Phase::Running) && !self.pivot_done()
    }

    /// The one place where an operation changes.
    ///
    /// # Errors
    /// The table in the module's comment does not have it.
    pub fn apply(mut self, transition: Transition) -> Result<Self, IllegalTransition> {
        use Transition as T;
        let illegal = self.illegal(&transition);
        match (self.phase.clone(), transition) {
            (Phase::Queued | Phase::Running, T::Start(i)) if self.first_not_done() == Some(i) => {
                self.marks[i] = match self.marks[i] {
                    Mark::Started { attempts } => Mark::Started { attempts: attempts.saturating_add(1) },
                    _ => Mark::Started { attempts: 1 },
                };
                self.phase = Phase::Running;
            }
            (Phase::Running, T::Done(i)) if self.is_started(i) => {
                self.marks[i] = Mark::Done;
                if self.first_not_done().is_none() {
                    self.phase = Phase::Succeeded;
                }
            }
            (Phase::Running, T::Fail(i, because)) if self.is_started(i) && self.pivot_done() => {
                self.phase = Phase::Stuck { heading: Heading::Forward, because };
            }
            (Phase::Running, T::Fail(i, failure)) if self.is_started(i) => self.unwind(failure),
            (Phase::Queued | Phase::Running, T::Cancel(failure)) if !self.pivot_done() => self.unwind(failure),
            (Phase::Unwinding { .. }, T::UndoStart(i)) if self.last_to_undo() == Some(i) => {
                self.marks[i] = match self.marks[i] {
                    Mark::Undoing { attempts } => Mark::Undoing { attempts: attempts.saturating_add(1) },
                    _ => Mark::Undoing { attempts: 1 },
                };
            }
            (Phase::Unwinding { failure }, T::UndoDone(i)) if self.is_undoing(i) => {
                self.marks[i] = Mark::Undone;
                self.unwind(failure);
            }
            (Phase::Unwinding { failure }, T::UndoFail(i, because)) if self.is_undoing(i) => {
                self.phase = Phase::Stuck { heading: Heading::Back { failure }, because };
            }
            (phase, T::Park(because)) => self.phase = phase.park(because).ok_or(illegal)?,
            (Phase::Stuck { heading, .. }, T::Resume) => {
                for mark in &mut self.marks {
                    match mark {
                        Mark::Started { attempts } | Mark::Undoing { attempts } => *attempts = 0,
                        Mark::Untouched | Mark::Done | Mark::Undone => {}
                    }
                }
                self.phase = heading.resume();
            }
            _ => return Err(illegal),
        }
        Ok(self)
    }

    fn unwind(&mut self, failure: ApiError) {
        self.phase = match self.last_to_undo() {
            Some(_) => Phase::Unwinding { failure },
            None => Phase::Failed { failure },
        };
    }

    fn first_not_done(&self) -> Option<usize> {
        self.marks.iter().position(|mark| *mark != Mark::Done)
    }

    fn last_to_undo(&self) -> Option<usize> {
        self.marks.iter().zip(&self.plan.0).rposition(|(mark, step)| {
            step.has_undo && matches!(mark, Mark::Started { .. } | Mark::Done | Mark::Undoing { .. })
        })
    }

    fn pivot_done(&self) -> bool {
        self.marks.iter().zip(&self.plan.0).any(|(mark, step)| step.pivot && *mark == Mark::Done)
    }

    fn is_started(&self, index: usize) -> bool {
        matches!(self.mark(index), Mark::Started { .. })
    }

    fn is_undoing(&self, index: usize) -> bool {
        matches!(self.mark(index), Mark::Undoing { .. })
    }

    fn illegal(&self, transition: &Transition) -> IllegalTransition {
        let step = match self.next() {
            Next::Act(i) | Next::Undo(i) => Some(self.plan.0[i].name.clone()),
            Next::Rest => None,
        };
        IllegalTransition { status: self.phase.status().as_str(), step, transition: transition.name() }
    }
}

impl Phase {
    /// The phase without what it carries.
    pub const fn status(&self) -> OperationStatus {
        match self {
            Self::Queued => OperationStatus::Queued,
            Self::Running => OperationStatus::Running,
            Self::Unwinding { .. } => OperationStatus::Unwinding,
            Self::Succeeded => OperationStatus::Succeeded,
            Self::Failed { .. } => OperationStatus::Failed,
            Self::Stuck { .. } => OperationStatus::Stuck,
        }
    }

    /// Why it unwinds or failed.
    pub const fn failure(&self) -> Option<&ApiError> {
        match self {
            Self::Unwinding { failure }
            | Self::Failed { failure }
            | Self::Stuck { heading: Heading::Back { failure }, .. } => Some(failure),
            Self::Queued | Self::Running | Self::Succeeded | Self::Stuck { heading: Heading::Forward, .. } => None,
        }
    }

    /// [`Transition::Park`], also for an operation whose steps cannot be read; `None`: it is at rest already.
    pub(crate) fn park(self, because: ApiError) -> Option<Self> {
        let heading = match self {
            Self::Queued | Self::Running => Heading::Forward,
            Self::Unwinding { failure } => Heading::Back { failure },
            Self::Succeeded | Self::Failed { .. } | Self::Stuck { .. } => return None,
        };
        Some(Self::Stuck { heading, because })
    }
}

impl Heading {
    /// Where [`Transition::Resume`] leads.
    pub(crate) fn resume(self) -> Phase {
        match self {
            Self::Forward => Phase::Running,
            Self::Back { failure } => Phase::Unwinding { failure },
        }
    }
}

impl Transition {
    const fn name(&self) -> &'static str {
        match self {
            Self::Start(_) => "start",
            Self::Done(_) => "done",
            Self::Fail(..) => "fail",
            Self::Cancel(_) => "cancel",
            Self::UndoStart(_) => "undo_start",
            Self::UndoDone(_) => "undo_done",
            Self::UndoFail(..) => "undo_fail",
            Self::Park(_) => "park",
            Self::Resume => "resume",
        }
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
