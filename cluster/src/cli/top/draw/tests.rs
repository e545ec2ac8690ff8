use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::super::snapshot::tests::heard;
use super::super::snapshot::{Heard, Snapshot};
use super::*;

const SMALL: (u16, u16) = (80, 24);
const LARGE: (u16, u16) = (200, 50);

fn drawn(snapshot: &Snapshot, view: &View, (width, height): (u16, u16)) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, snapshot, view)).unwrap();
    let buffer = terminal.backend().buffer();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    (0..height).map(line).collect()
}

fn running() -> Snapshot {
    Snapshot::of(&heard(4_000, 90), Some(&heard(2_000, 10)))
}

#[test]
fn all_of_it_fits_80_columns_and_24_lines() {
    let lines = drawn(&running(), &View::of("prod".to_owned()), SMALL);
    let text = lines.join("\n");
    assert!(text.starts_with("farfork top  prod  31 machines, 80 forks/s\n hosts 3 ─"), "{text}");
    let expected = [
        "HOST             STATE       MACHINES          MEMORY FORKS/s      IN/s  SETTLED",
        "node-1 *         up          12/10000    5.0/20.0 GiB      40    40 MiB    2 + 1",
        "node-2           draining    12/10000    5.0/20.0 GiB      40    40 MiB    2 + 1",
        "node-3           lost         7/10000    5.0/20.0 GiB       -         -        -",
    ];
    assert_eq!(lines[2..6], expected, "{text}");
    for expected in ["aaaaaaaaaaaa        1 + 1        12", "████··········         100/300      10      50    40.0"]
    {
        assert!(text.contains(expected), "{expected} is not in\n{text}");
    }
    assert_eq!(lines[23], "q leaves, tab and arrows choose");
}

#[test]
fn where_there_is_room_there_is_more() {
    let text = drawn(&running(), &View::of("prod".to_owned()), LARGE).join("\n");
    assert!(text.contains("OUT/s") && text.contains("node-3"), "{text}");
    // Nor does any other size make it fail.
    for size in [(1, 1), (1, 50), (200, 1), (10, 5), (0, 0)] {
        drawn(&running(), &View::default(), size);
    }
}

#[test]
fn an_empty_cluster_and_one_that_does_not_answer_are_shown() {
    for size in [SMALL, LARGE] {
        let text = drawn(&Snapshot::default(), &View::default(), size).join("\n");
        assert!(text.contains("hosts 0") && text.contains("templates 0") && text.contains("jobs 0"), "{text}");
        let heard = Heard { troubles: vec!["the cluster: no answer within 5 s".to_owned()], ..Heard::default() };
        let lines = drawn(&Snapshot::of(&heard, None), &View::default(), size);
        assert_eq!(lines.last().unwrap(), "the cluster: no answer within 5 s");
    }
}

#[test]
fn long_names_are_cut_and_leave_the_numbers_where_they_are() {
    let mut snapshot = running();
    snapshot.hosts[1].name = "n".repeat(64);
    snapshot.templates[0].name = "t".repeat(128);
    snapshot.jobs[0].name = Some("j".repeat(64));
    for size in [SMALL, LARGE] {
        let (plain, long) = (drawn(&running(), &View::default(), size), drawn(&snapshot, &View::default(), size));
        let numbers = |lines: &[String]| lines[4].split_once("draining").unwrap().1.to_owned();
        assert_eq!(numbers(&plain), numbers(&long));
        assert!(long.join("\n").contains("100/300") && long.join("\n").contains("aaaaaaaaaaaa"));
    }
}

#[test]
fn no_name_commands_the_terminal() {
    let mut snapshot = running();
    let bad = "\u{1b}[2J\r\u{9b}K\nx".to_owned();
    snapshot.hosts[0].name.clone_from(&bad);
    snapshot.hosts[0].life.clone_from(&bad);
    snapshot.templates[0].name.clone_from(&bad);
    snapshot.templates[0].image = Some(bad.clone());
    snapshot.templates[0].building = Some(bad.clone());
    snapshot.jobs[0].name = Some(bad.clone());
    snapshot.jobs[0].template.clone_from(&bad);
    snapshot.troubles = vec![bad.clone()];
    let whole = tables(&snapshot);
    assert!(!whole.contains(|c: char| c.is_control() && c != '\n') && whole.contains("[2J"), "{whole:?}");
    for size in [SMALL, LARGE] {
        let text = drawn(&snapshot, &View::of(bad.clone()), size).concat();
        assert!(!text.contains(char::is_control) && text.contains("\u{FFFD}[2J"), "{text:?}");
    }
}

#[test]
fn what_is_chosen_is_in_sight_and_has_most_room() {
    let mut snapshot = running();
    let host = snapshot.hosts[2].clone();
    snapshot.hosts.extend((0..97).map(|number| Host { name: format!("more-{number}"), ..host.clone() }));
    let mut view = View::default();
    view.go(isize::MAX, &snapshot);
    assert!(drawn(&snapshot, &view, SMALL).join("\n").contains("more-96"));
    view.go(-1, &snapshot);
    assert!(drawn(&snapshot, &view, SMALL).join("\n").contains("more-95"));
    // They have gone meanwhile.
    snapshot.hosts.truncate(1);
    assert!(drawn(&snapshot, &view, SMALL).join("\n").contains("node-1"));
    view.go(-1, &snapshot);
    let row = |view: &View| drawn(&snapshot, view, LARGE).iter().position(|line| line.contains(" templates ")).unwrap();
    let before = row(&view);
    view.turn(true);
    assert!(row(&view) < before);
    view.turn(false);
    assert_eq!(row(&view), before);
}

#[test]
fn tables_say_the_same() {
    let text = tables(&running());
    for expected in ["node-1 *", "12/10000", "5.0/20.0 GiB", "aaaaaaaaaaaa", "1 + 1", "100/300"] {
        assert!(text.contains(expected), "{expected} is not in\n{text}");
    }
}
