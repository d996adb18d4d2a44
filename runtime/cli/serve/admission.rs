//! What every request passes: the token, its body, a place, and a time limit.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, MatchedPath, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;
use tokio::time::{Instant, timeout_at};

use super::App;
use super::error::{ApiError, ApiResult};
use super::held::Held;
use super::ticket::Ticket;

/// Time for a request's body to come: until then it has no place.
const BODY: Duration = Duration::from_secs(30);

/// The middleware around all routes.
pub async fn admit(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let endpoint = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let ticket = Arc::new(Ticket::new(&app, &endpoint, request.extensions().get()));
    let has_no_body = request.method() == Method::HEAD;
    let response = pass(&app, &endpoint, &ticket, request, next).await.unwrap_or_else(ApiError::into_response);
    ticket.set_status(response.status());
    if has_no_body {
        ticket.answered();
    }
    response.map(|body| Held::wrap(body, ticket))
}

async fn pass(app: &Arc<App>, path: &str, ticket: &Arc<Ticket>, request: Request, next: Next) -> ApiResult<Response> {
    // Whoever looks after the process has no token.
    if path != "/health" && !authorised(app, request.headers()) {
        return Err(ApiError::unauthorized());
    }
    if request.method() != Method::POST {
        return Ok(next.run(request).await);
    }
    ticket.enter_queue()?;
    let mut request = with_body(app, ticket, request).await?;
    request.extensions_mut().insert(ticket.clone());
    let answer = async {
        ticket.take_place().await?;
        Ok(next.run(request).await)
    };
    timeout_at(ticket.deadline, answer).await.unwrap_or_else(|_| Err(ticket.late()))
}

/// Reads the body, within the budget that all bodies share.
async fn with_body(app: &Arc<App>, ticket: &Ticket, request: Request) -> ApiResult<Request> {
    let declared = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
    // What has no length may become as long as is allowed.
    let length: usize = declared.unwrap_or(app.max_body);
    if length > app.max_body {
        return Err(ApiError::too_large(app.max_body));
    }
    ticket.charge_bytes(length)?;
    let (parts, body) = request.into_parts();
    let limit = ticket.deadline.min(Instant::now() + BODY);
    let read = Bytes::from_request(Request::from_parts(parts.clone(), body), app);
    let bytes = timeout_at(limit, read).await.map_err(|_| ApiError::slow_body())?;
    let bytes = bytes.map_err(|e| match e.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(app.max_body),
        _ => ApiError::body(e.to_string()),
    })?;
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

fn authorised(app: &App, headers: &HeaderMap) -> bool {
    let Some(token) = &app.token else { return true };
    let given = headers.get(AUTHORIZATION).map(|v| v.as_bytes()).and_then(|v| v.split_at_checked(7));
    // How long it takes says nothing about the token but its length.
    matches!(given, Some((scheme, given)) if scheme.eq_ignore_ascii_case(b"bearer ") && bool::from(given.ct_eq(token.as_bytes())))
}
