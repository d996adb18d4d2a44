//! An answer's body that holds the request's ticket until its bytes are written.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};

use super::ticket::Ticket;

pub struct Held {
    body: Body,
    ticket: Arc<Ticket>,
}

/// hyper drops a body when it has all of its bytes, but those only when they are written: so they hold it too.
struct Unwritten {
    bytes: Bytes,
    _ticket: Arc<Ticket>,
}

impl AsRef<[u8]> for Unwritten {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Held {
    pub fn wrap(body: Body, ticket: Arc<Ticket>) -> Body {
        if body.is_end_stream() {
            ticket.answered();
        }
        Body::new(Held { body, ticket })
    }
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() || self.body.is_end_stream() {
            self.ticket.answered();
        }
        let held = |bytes| Bytes::from_owner(Unwritten { bytes, _ticket: self.ticket.clone() });
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(held))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
