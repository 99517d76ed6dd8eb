use super::*;
use proptest::prelude::*;
use systemprompt_contract::ErrorCode;

fn error(text: &str) -> ApiError {
    ApiError::new(ErrorCode::Internal, text)
}

/// `u`: has an undo, `n`: needs none, `p`: pivot with an undo.
fn plan(steps: &str) -> Plan {
    let step = |(index, kind): (usize, char)| PlannedStep {
        name: format!("step{index}"),
        has_undo: kind != 'n',
        pivot: kind == 'p',
    };
    Plan(steps.chars().enumerate().map(step).collect())
}

/// Applies transitions in the notation `s0 d0 f1 c U1 D1 F1 p r` and says the phase, or what was refused.
fn check(steps: &str, transitions: &str, expected: &str) {
    let mut journal = Journal::new(plan(steps));
    for text in transitions.split_whitespace() {
        let (kind, index) = text.split_at(1);
        let index = || index.parse::<usize>().unwrap();
        let transition = match kind {
            "s" => Transition::Start(index()),
            "d" => Transition::Done(index()),
            "f" => Transition::Fail(index(), error("failed")),
            "c" => Transition::Cancel(error("cancelled")),
            "U" => Transition::UndoStart(index()),
            "D" => Transition::UndoDone(index()),
            "F" => Transition::UndoFail(index(), error("undo failed")),
            "p" => Transition::Park(error("parked")),
            "r" => Transition::Resume,
            _ => panic!("unknown transition {text}"),
        };
        match journal.apply(transition) {
            Ok(next) => journal = next,
            Err(refused) => {
                return assert_eq!(format!("refused {text}"), expected, "{steps}: {transitions}: {refused}");
            }
        }
    }
    let next = match journal.next() {
        Next::Act(index) => format!("act {index}"),
        Next::Undo(index) => format!("undo {index}"),
        Next::Rest => "rest".to_owned(),
    };
    assert_eq!(format!("{}, {next}", journal.phase().status().as_str()), expected, "{steps}: {transitions}");
}

#[test]
fn forward() {
    check("uu", "", "queued, act 0");
    check("uu", "s0", "running, act 0");
    check("uu", "s0 s0 d0", "running, act 1");
    check("uu", "s0 d0 s1 d1", "succeeded, rest");
    check("uu", "s1", "refused s1");
    check("uu", "d0", "refused d0");
    check("uu", "s0 d0 d0", "refused d0");
    check("uu", "s0 d0 s0", "refused s0");
    check("uu", "s0 d0 s1 d1 s1", "refused s1");
}

#[test]
fn backward_in_reverse_with_the_failing_step_and_without_what_needs_no_undo() {
    check("uuu", "s0 d0 s1 f1", "unwinding, undo 1");
    check("uuu", "s0 d0 s1 f1 U1 U1 D1", "unwinding, undo 0");
    check("uuu", "s0 d0 s1 f1 U1 D1 U0 D0", "failed, rest");
    check("unu", "s0 d0 s1 d1 s2 f2 U2 D2", "unwinding, undo 0");
    check("nn", "s0 d0 s1 f1", "failed, rest");
    check("uu", "s0 d0 s1 f1 U0", "refused U0");
    check("uu", "s0 d0 s1 f1 D1", "refused D1");
    check("uu", "s0 f0 s0", "refused s0");
    check("uu", "s0 f0 c", "refused c");
    check("uu", "s0 d0 f1", "refused f1");
}

#[test]
fn cancellation_is_heard_before_the_pivot_only() {
    check("uu", "c", "failed, rest");
    check("uu", "s0 c", "unwinding, undo 0");
    check("uu", "s0 d0 c", "unwinding, undo 0");
    check("upu", "s0 d0 s1 c", "unwinding, undo 1");
    check("upu", "s0 d0 s1 d1 c", "refused c");
}

#[test]
fn parked_and_resumed_the_way_it_was_going() {
    check("uu", "s0 f0 U0 F0", "stuck, rest");
    check("uu", "s0 f0 U0 F0 r", "unwinding, undo 0");
    check("uu", "s0 f0 U0 F0 r U0 D0", "failed, rest");
    check("pu", "s0 d0 s1 f1", "stuck, rest");
    check("pu", "s0 d0 s1 f1 r", "running, act 1");
    check("pu", "s0 f0", "unwinding, undo 0");
    check("uu", "p", "stuck, rest");
    check("uu", "s0 d0 p r", "running, act 1");
    check("uu", "s0 f0 p r", "unwinding, undo 0");
    check("uu", "s0 d0 s1 d1 p", "refused p");
    check("uu", "p p", "refused p");
    check("uu", "r", "refused r");
}

#[test]
fn attempts_are_counted_and_counted_anew_after_a_resume() {
    let apply = |journal: Journal, transition| journal.apply(transition).unwrap();
    let mut journal = Journal::new(plan("pu"));
    for transition in [Transition::Start(0), Transition::Done(0), Transition::Start(1), Transition::Start(1)] {
        journal = apply(journal, transition);
    }
    assert_eq!(journal.mark(1), Mark::Started { attempts: 2 });
    journal = apply(apply(journal, Transition::Fail(1, error("x"))), Transition::Resume);
    assert_eq!(journal.mark(1), Mark::Started { attempts: 0 });
    assert_eq!(apply(journal, Transition::Start(1)).mark(1), Mark::Started { attempts: 1 });
}

#[test]
fn a_journal_of_another_version_is_named() {
    let stored = [StoredStep { position: 1, name: "renamed".to_owned(), mark: Mark::Done }];
    let error = Journal::load(plan("uu"), Phase::Running, &stored).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the journal has step 1 as \"renamed\", this worker has Some(\"step1\"); it was written by another version"
    );
    let beyond = [StoredStep { position: 7, name: "more".to_owned(), mark: Mark::Done }];
    Journal::load(plan("uu"), Phase::Running, &beyond).unwrap_err();
}

fn transitions() -> impl Strategy<Value = Transition> {
    let index = 0..4_usize;
    prop_oneof![
        index.clone().prop_map(Transition::Start),
        index.clone().prop_map(Transition::Done),
        index.clone().prop_map(|i| Transition::Fail(i, error("failed"))),
        Just(Transition::Cancel(error("cancelled"))),
        index.clone().prop_map(Transition::UndoStart),
        index.clone().prop_map(Transition::UndoDone),
        index.prop_map(|i| Transition::UndoFail(i, error("undo failed"))),
        Just(Transition::Park(error("parked"))),
        Just(Transition::Resume),
    ]
}

proptest! {
    /// Whatever comes in whatever order: the marks keep the shape that unwinding relies on, a rest is a rest, and
    /// what was read back from storage behaves as what was never stored.
    #[test]
    fn any_sequence_keeps_the_invariants(steps in "[unp]{1,4}", sequence in prop::collection::vec(transitions(), 0..60)) {
        let plan = plan(&steps);
        let mut journal = Journal::new(plan.clone());
        for transition in sequence {
            let resting = journal.next() == Next::Rest;
            let before = journal.clone();
            let Ok(next) = journal.clone().apply(transition.clone()) else { continue };
            prop_assert!(!resting || transition == Transition::Resume, "{before:?} moved by {transition:?}");
            journal = next;
            check_shape(&plan, &journal)?;
            let stored: Vec<_> = (0..plan.0.len())
                .filter(|i| journal.mark(*i) != Mark::Untouched)
                .map(|i| StoredStep { position: i, name: plan.0[i].name.clone(), mark: journal.mark(i) })
                .collect();
            let loaded = Journal::load(plan.clone(), journal.phase().clone(), &stored);
            prop_assert_eq!(loaded.as_ref(), Ok(&journal));
        }
        // From anywhere a worker that follows `next` comes to rest, and leaves nothing half undone.
        for _ in 0..20 {
            journal = match journal.next() {
                Next::Act(i) => journal.apply(Transition::Start(i)).unwrap().apply(Transition::Done(i)).unwrap(),
                Next::Undo(i) => journal.apply(Transition::UndoStart(i)).unwrap().apply(Transition::UndoDone(i)).unwrap(),
                Next::Rest => break,
            };
        }
        prop_assert_eq!(journal.next(), Next::Rest);
        check_shape(&plan, &journal)?;
    }
}

fn check_shape(plan: &Plan, journal: &Journal) -> Result<(), TestCaseError> {
    let marks: Vec<_> = (0..plan.0.len()).map(|i| journal.mark(i)).collect();
    let open = marks.iter().filter(|mark| matches!(mark, Mark::Started { .. } | Mark::Undoing { .. })).count();
    match journal.phase() {
        Phase::Succeeded => prop_assert!(marks.iter().all(|mark| *mark == Mark::Done), "{journal:?}"),
        Phase::Failed { .. } => {
            for (mark, step) in marks.iter().zip(&plan.0) {
                prop_assert!(!step.has_undo || matches!(mark, Mark::Untouched | Mark::Undone), "{journal:?}");
            }
        }
        Phase::Queued | Phase::Running => prop_assert!(open <= 1, "{journal:?}"),
        Phase::Unwinding { .. } | Phase::Stuck { .. } => {}
    }
    // Steps begin in order: behind an untouched one all are untouched.
    let begun = marks.iter().rposition(|mark| *mark != Mark::Untouched).map_or(0, |last| last + 1);
    prop_assert!(marks[..begun].iter().all(|mark| *mark != Mark::Untouched), "{journal:?}");
    Ok(())
}
