package backend

import (
	"cmp"
	"crypto/subtle"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// SecretPlace is a place in a request where a server looks for its secret.
type SecretPlace string

// The places that the product's documentation names, version by version.
const (
	SecretInHeader SecretPlace = "header" // the header "secret", documented from 2.2.1 on
	SecretInQuery  SecretPlace = "query"  // the query parameter "secret"
	SecretInSerect SecretPlace = "serect" // the query parameter "serect", documented up to 1.9
)

// secretPlaces lists all places. It is the default.
var secretPlaces = []SecretPlace{SecretInHeader, SecretInQuery, SecretInSerect}

// ParseSecretPlaces reads a list of places that are separated by commas, such as "header,query".
func ParseSecretPlaces(list string) ([]SecretPlace, error) {
	var places []SecretPlace
	for name := range strings.SplitSeq(list, ",") {
		place := SecretPlace(strings.TrimSpace(name))
		if !slices.Contains(secretPlaces, place) {
			return nil, fmt.Errorf("unknown place for the secret %q: expected header, query or serect", name)
		}
		places = append(places, place)
	}
	return places, nil
}

// Access says which requests a broker or a node answers. Its fields must not change while requests are served.
type Access struct {
	Secret   string        // what a request must hold
	SecretIn []SecretPlace // where it may hold it; default: all places
	Refuse   int           // the status of an answer to any other request; default: 400, since no 401 is documented
}

// serve passes the request on if it holds the secret in one of the places.
func (a *Access) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	places := a.SecretIn
	if len(places) == 0 {
		places = secretPlaces
	}
	for _, place := range places {
		if subtle.ConstantTimeCompare([]byte(place.value(r)), []byte(a.Secret)) == 1 {
			next.ServeHTTP(w, r)
			return
		}
	}
	http.Error(w, "the secret is missing or wrong", cmp.Or(a.Refuse, http.StatusBadRequest))
}

// value returns what the request holds in the place.
func (p SecretPlace) value(r *http.Request) string {
	switch p {
	case SecretInHeader:
		return r.Header.Get("secret")
	case SecretInQuery:
		return r.URL.Query().Get("secret")
	case SecretInSerect:
		return r.URL.Query().Get("serect")
	}
	return ""
}

// addSecret puts the secret into all places of a request to a node, whose version is not known.
func addSecret(r *http.Request, secret string) {
	r.Header.Set("secret", secret)
	query := r.URL.Query()
	query.Set("secret", secret)
	query.Set("serect", secret)
	r.URL.RawQuery = query.Encode()
}
