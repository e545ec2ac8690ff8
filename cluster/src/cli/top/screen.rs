//! The terminal: taken, drawn on, and given back however this ends.

use std::io::{self, IsTerminal};
use std::thread;
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::EVERY;
use super::ask::ask;
use super::draw::{View, draw};
use super::snapshot::{Heard, Snapshot};
use crate::cli::client::{Client, ClientError};
use crate::cli::error::CliError;

/// How soon the thread that reads keys sees that nobody wants them any more.
const KEYS_WITHIN: Duration = Duration::from_millis(100);
/// Keys that may wait.
const KEYS_MAX: usize = 16;
/// Lines of a page.
const PAGE: isize = 10;

/// Whether there is somebody to show it to.
pub(super) fn is_there() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Shows it until the user leaves. A request that fails is said, and asked again.
pub(super) async fn run(client: &Client) -> Result<(), CliError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Runtime)?;
    let mut screen = Screen::take().map_err(CliError::Print)?;
    let mut keys = keys();
    let (say, mut answers) = mpsc::channel::<Result<Heard, ClientError>>(1);
    let mut timer = interval(EVERY);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut view = View::of(client.whom());
    let mut snapshot = Snapshot { troubles: vec!["asking".to_owned()], ..Snapshot::default() };
    let (mut before, mut is_asking) = (None, false);
    loop {
        screen.terminal.draw(|frame| draw(frame, &snapshot, &view)).map_err(CliError::Print)?;
        tokio::select! {
            _ = timer.tick(), if !is_asking => {
                is_asking = true;
                let (client, say) = (client.clone(), say.clone());
                // Keys are answered meanwhile.
                tokio::spawn(async move {
                    let _ = say.send(ask(&client).await).await;
                });
            }
            Some(heard) = answers.recv() => {
                is_asking = false;
                match heard {
                    Ok(heard) => {
                        snapshot = Snapshot::of(&heard, before.as_ref());
                        before = Some(heard);
                    }
                    // What was seen last stays.
                    Err(error) => snapshot.troubles = vec![error.to_string()],
                }
            }
            key = keys.recv() => match key {
                Some(Event::Key(key)) if does_leave(key) => return Ok(()),
                Some(Event::Key(key)) => press(key.code, &mut view, &snapshot),
                // The next frame has the new size.
                Some(_) => {}
                // The terminal is gone.
                None => return Ok(()),
            },
            _ = terminate.recv() => return Ok(()),
        }
    }
}

/// The terminal, which is as it was before when this is dropped, and also after a panic.
struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    fn take() -> io::Result<Self> {
        ratatui::try_init().map(|terminal| Self { terminal }).inspect_err(|_| ratatui::restore())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Keys and resizes, read by a thread of their own: that waits.
fn keys() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(KEYS_MAX);
    thread::spawn(move || {
        while !sender.is_closed() {
            let read = match event::poll(KEYS_WITHIN) {
                Ok(false) => continue,
                Ok(true) => event::read(),
                Err(error) => Err(error),
            };
            let Ok(event) = read else { return };
            if matches!(event, Event::Resize(..)) || matches!(event, Event::Key(key) if key.kind == KeyEventKind::Press) {
                let _ = sender.blocking_send(event);
            }
        }
    });
    receiver
}

fn does_leave(key: KeyEvent) -> bool {
    // In this mode the terminal makes no signal of it.
    let is_interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    is_interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
}

fn press(key: KeyCode, view: &mut View, snapshot: &Snapshot) {
    match key {
        KeyCode::Tab | KeyCode::Right => view.turn(true),
        KeyCode::BackTab | KeyCode::Left => view.turn(false),
        KeyCode::Up | KeyCode::Char('k') => view.go(-1, snapshot),
        KeyCode::Down | KeyCode::Char('j') => view.go(1, snapshot),
        KeyCode::PageUp => view.go(-PAGE, snapshot),
        KeyCode::PageDown => view.go(PAGE, snapshot),
        KeyCode::Home => view.go(isize::MIN, snapshot),
        KeyCode::End => view.go(isize::MAX, snapshot),
        _ => {}
    }
}
