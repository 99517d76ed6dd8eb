//! Our own client where an upload is cut off in the middle, and where the registry holds a damaged blob.

use crate::{
    push::{built, client_of},
    support::{Server, config},
};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    middleware::{self, Next},
    response::Response,
};
use futures_util::{StreamExt, stream};
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt;
use std::{
    path::Path,
    sync::{Arc, Mutex},
};
use systemprompt_contract::IMAGE_REPOSITORY;
use systemprompt_oci::PushEvent;

/// What becomes of the first upload of a large blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The connection breaks after so many bytes.
    CutAfter(usize),
    /// All is stored, the answer is lost.
    AnswerLost,
    /// The connection breaks, and nobody says how far the upload is.
    CutAndSilent(usize),
}

#[derive(Clone)]
struct Network {
    fate: Fate,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    /// It happened.
    broken: bool,
    /// Requests that began, gave up or finished an upload: method and `Content-Range`.
    uploads: Vec<(Method, Option<String>)>,
}

async fn broken_once(State(network): State<Network>, request: Request, next: Next) -> Response {
    let is_upload = request.uri().path().contains("/blobs/uploads/");
    let length: Option<usize> =
        request.headers().get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse().ok());
    if is_upload {
        let range = request.headers().get(header::CONTENT_RANGE).map(|range| range.to_str().expect("text").to_owned());
        network.seen.lock().expect("no panic").uploads.push((request.method().clone(), range));
    }
    if is_upload && request.method() == Method::GET && matches!(network.fate, Fate::CutAndSilent(_)) {
        return status(StatusCode::BAD_GATEWAY);
    }
    let is_large_put = request.method() == Method::PUT && length.is_some_and(|length| length > 1 << 19);
    if !(is_upload && is_large_put) || std::mem::replace(&mut network.seen.lock().expect("no panic").broken, true) {
        return next.run(request).await;
    }
    match network.fate {
        Fate::CutAfter(count) | Fate::CutAndSilent(count) => {
            let (head, body) = request.into_parts();
            let whole = body.collect().await.expect("a body").to_bytes();
            let chunks = [Ok(whole.slice(..count)), Err(std::io::Error::other("cut"))];
            let body = Body::from_stream(stream::iter::<[Result<Bytes, _>; 2]>(chunks).boxed());
            next.run(Request::from_parts(head, body)).await;
        }
        Fate::AnswerLost => drop(next.run(request).await),
    }
    // As from a proxy before the registry.
    status(StatusCode::BAD_GATEWAY)
}

fn status(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

async fn pushed_through(fate: Fate, dir: &Path) -> Vec<(Method, Option<String>)> {
    let network = Network { fate, seen: Arc::default() };
    let seen = Arc::clone(&network.seen);
    let around = |router: Router| router.layer(middleware::from_fn_with_state(network, broken_once));
    let server = Server::start_with(config(dir.join("registry")), around).await;
    let tenant = server.tenant();
    let image = built(dir, "page");
    let largest = image.layers.iter().max_by_key(|layer| layer.descriptor.size).expect("layers").descriptor.clone();
    let counted = Mutex::new(0);
    let count = |event| match event {
        PushEvent::Uploading { digest, .. } if digest == largest.digest => *counted.lock().expect("no panic") = 0,
        PushEvent::Progress { digest, bytes } if digest == largest.digest => {
            *counted.lock().expect("no panic") += bytes;
        }
        _ => {}
    };
    client_of(&tenant).push(&image, IMAGE_REPOSITORY, &tenant.tag(), &count).await.expect("in the end");
    server.registry.image(tenant.id, &image.digest).await.expect("whole");
    assert_eq!(*counted.lock().expect("no panic"), largest.size, "progress ends at the blob's size");
    let seen = std::mem::take(&mut *seen.lock().expect("no panic"));
    assert!(seen.broken, "no blob was large enough");
    seen.uploads
}

fn count(uploads: &[(Method, Option<String>)], method: &Method) -> usize {
    uploads.iter().filter(|(of, _)| of == method).count()
}

#[tokio::test]
async fn an_upload_that_was_cut_off_goes_on_where_it_stands() {
    let dir = tempfile::tempdir().expect("dir");
    let whole = pushed_through(Fate::AnswerLost, &dir.path().join("lost")).await;
    let uploads = pushed_through(Fate::CutAfter(300_000), &dir.path().join("cut")).await;
    let resumed: Vec<_> = uploads.iter().filter_map(|(_, range)| range.as_deref()).collect();
    assert!(matches!(resumed[..], [range] if range.starts_with("300000-")), "{resumed:?}");
    // Every session that was begun was finished, by one PUT more than there are blobs.
    assert_eq!(count(&uploads, &Method::PUT), count(&uploads, &Method::POST) + 1);
    assert_eq!(count(&whole, &Method::POST), count(&uploads, &Method::POST), "what is there is not sent again");
}

#[tokio::test]
async fn an_upload_that_cannot_go_on_is_given_up_first() {
    let dir = tempfile::tempdir().expect("dir");
    for (number, fate) in [Fate::CutAfter(0), Fate::CutAndSilent(300_000)].into_iter().enumerate() {
        let uploads = pushed_through(fate, &dir.path().join(number.to_string())).await;
        assert_eq!(count(&uploads, &Method::DELETE), 1, "{fate:?}: {uploads:?}");
        assert_eq!(count(&uploads, &Method::PUT), count(&uploads, &Method::POST), "{fate:?}: {uploads:?}");
        assert!(uploads.iter().all(|(_, range)| range.is_none()), "{fate:?}: {uploads:?}");
    }
}

/// Says of every blob below a thousand bytes that it is one byte long.
async fn shortened(request: Request, next: Next) -> Response {
    let is_head = request.method() == Method::HEAD;
    let mut response = next.run(request).await;
    let is_small = |length: &HeaderValue| length.to_str().is_ok_and(|length| length.len() < 4);
    if is_head && response.headers().get(header::CONTENT_LENGTH).is_some_and(is_small) {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("1"));
    }
    response
}

#[tokio::test]
async fn a_blob_of_another_length_is_sent_again() {
    let dir = tempfile::tempdir().expect("dir");
    let around = |router: Router| router.layer(middleware::from_fn(shortened));
    let server = Server::start_with(config(dir.path().join("registry")), around).await;
    let tenant = server.tenant();
    let image = built(dir.path(), "page");
    let sizes = image.layers.iter().map(|layer| layer.descriptor.size).chain([image.config_descriptor.size]);
    let small = sizes.filter(|&size| size < 1000).count();
    assert!(small > 0, "the site is small");
    let push = || async { client_of(&tenant).push(&image, IMAGE_REPOSITORY, &tenant.tag(), &|_| {}).await };
    push().await.expect("pushed");
    assert_eq!(push().await.expect("pushed again").uploaded_blobs, small);
}
