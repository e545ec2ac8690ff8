//! Templates out of a node and into another: one archive each, which is verified where it comes in.

use std::io::{self, Read};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, Request, State as Shared};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use tokio::sync::mpsc;

use super::caller::Caller;
use super::error::ApiError;
use super::extract::PathText;
use super::routes::App;
use super::templates::template;
use super::wire::{ErrorAnswer, Template};

/// Bytes read at a time, and pieces that are ahead of who takes them.
const PIECE: usize = 256 << 10;
const AHEAD: usize = 4;

/// Exports a template: all of it, as one archive
///
/// It is not packed, and has long runs of zeros.
#[utoipa::path(
    get,
    path = "/v1/templates/{name}/archive",
    tag = "templates",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The archive", content_type = "application/octet-stream"),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn export(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(name): PathText,
) -> Result<Response, ApiError> {
    let name = caller.name(&name)?;
    let mut file = app.look(move |service| service.export_template(&name)).await?;
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(AHEAD);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = vec![0; PIECE];
            let read = file.read(&mut piece).map(|count| {
                piece.truncate(count);
                Bytes::from(piece)
            });
            let is_last = read.as_ref().map_or(true, Bytes::is_empty);
            // A client that has left wants no more.
            if read.as_ref().is_ok_and(Bytes::is_empty) || sender.blocking_send(read).is_err() || is_last {
                return;
            }
        }
    });
    let pieces = futures_util::stream::unfold(receiver, |mut receiver| async move {
        let piece = receiver.recv().await?;
        Some((piece, receiver))
    });
    let headers = [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, length.to_string())];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// Imports a template: verifies the archive, saves and loads it
#[utoipa::path(
    put,
    path = "/v1/templates/{name}/archive",
    tag = "templates",
    params(("name" = String, Path, description = "The name that it gets")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "It is there", body = Template),
        (status = "4XX", description = "Refused; 422 BAD_IMAGE if it is damaged or cannot run on this host", body = ErrorAnswer),
        (status = "5XX", description = "Failed; there is no such template", body = ErrorAnswer)
    )
)]
pub(crate) async fn import(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(name): PathText,
    request: Request,
) -> Result<Json<Template>, ApiError> {
    // Its size has no bound but the disk.
    caller.check_owner()?;
    let name = caller.name(&name)?;
    let (sender, receiver) = mpsc::channel(AHEAD);
    let feeding = tokio::spawn(feed(request.into_body(), sender, app.limits().read_deadline));
    let named = name.clone();
    let mut archive = Pieces { receiver, piece: Bytes::new() };
    let imported = match app.check_name(&name).await {
        Ok(()) => app.act(move |service| service.import_template(&named, &mut archive)).await,
        Err(error) => {
            drop(archive);
            Err(error)
        }
    };
    // To its end, also of what is refused: a client that is still sending would not see the answer.
    feeding.await.unwrap_or_default();
    imported?;
    app.publish(&name).await?;
    Ok(Json(template(&app.look(move |service| service.template(&name)).await?)))
}

/// Passes the body on, as long as it keeps coming. What nobody wants any more is read and thrown away.
async fn feed(mut body: Body, sender: mpsc::Sender<io::Result<Bytes>>, patience: Duration) {
    let mut is_wanted = true;
    loop {
        let piece = match tokio::time::timeout(patience, body.frame()).await {
            Ok(None) => return,
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => Ok(data),
                Err(_) => continue,
            },
            Ok(Some(Err(error))) => Err(io::Error::other(error)),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        let is_over = piece.is_err();
        is_wanted = is_wanted && sender.send(piece).await.is_ok();
        if is_over {
            return;
        }
    }
}

struct Pieces {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.piece.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}
