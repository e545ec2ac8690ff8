//! Ranges of tasks, against a list of them.

use control::state::{Outcome, Task, Tasks};
use proptest::prelude::*;

fn task(kind: u8) -> Task {
    match kind % 4 {
        0 => Task::Waiting { attempt: 0, not_on: None },
        1 => Task::Waiting { attempt: 1, not_on: None },
        2 => Task::ended(Outcome::Exited(0)),
        _ => Task::ended(Outcome::Exited(1)),
    }
}

proptest! {
    #[test]
    fn ranges_are_what_a_list_would_be(
        count in 0u32..40,
        changes in proptest::collection::vec((0u32..45, 0u32..45, 0u8..4), 0..60),
    ) {
        let mut tasks = Tasks::new(count);
        let mut list = vec![task(0); count as usize];
        for (from, to, kind) in changes {
            let range = from.min(to)..from.max(to);
            let mut seen = Vec::new();
            tasks.change(range.clone(), |old| {
                seen.push(old);
                task(kind)
            });
            let inside = &mut list[(range.start.min(count) as usize)..(range.end.min(count) as usize)];
            prop_assert!(seen.len() <= inside.len());
            inside.fill(task(kind));
            prop_assert!(tasks.is_well_formed(), "{tasks:?}");
            let flat: Vec<Task> = tasks.iter().flat_map(|(range, task)| range.map(move |_| task)).collect();
            prop_assert_eq!(&flat, &list);
            prop_assert!((0..count).all(|index| tasks.get(index) == Some(list[index as usize])));
            prop_assert_eq!(tasks.get(count), None);
            let parts: Vec<Task> = tasks.within(range.clone()).into_iter().flat_map(|(part, task)| part.map(move |_| task)).collect();
            prop_assert_eq!(parts.len(), range.len().min((count.saturating_sub(range.start)) as usize));
        }
        prop_assert_eq!(tasks.are_done(), list.iter().all(|task| matches!(task, Task::Done { .. })));
    }
}
