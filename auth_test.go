package fsbroker_test

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

func TestAuthentication(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		secret portal portal-secret-1
		secret portal {file.%s}
		node node-1 %s
	}
	header X-Client {http.fsbroker.client},{http.auth.user.id}`, writeFile(t, "portal-secret-2\n"), node.URL))

	for name, test := range map[string]struct {
		query  string
		header string
		status int
	}{
		"none":                           {"", "", 401},
		"bearer":                         {"", "Bearer " + callerSecret, 200},
		"bearer in another case":         {"", "bearer   " + callerSecret, 200},
		"serect":                         {"&serect=" + callerSecret, "", 200},
		"secret":                         {"&secret=" + callerSecret, "", 200},
		"both spellings":                 {"&secret=" + callerSecret + "&serect=" + callerSecret, "", 200},
		"percent-encoded":                {"&secret=%74he-callers-own-secret", "", 200},
		"another client's":               {"", "Bearer portal-secret-1", 200},
		"a rotated one, from a file":     {"&secret=portal-secret-2", "", 200},
		"basic is somebody else's":       {"&secret=" + callerSecret, "Basic " + base64.StdEncoding.EncodeToString([]byte("a:b")), 200},
		"wrong bearer":                   {"", "Bearer wrong", 401},
		"wrong serect":                   {"&serect=wrong", "", 401},
		"wrong secret":                   {"&secret=wrong", "", 401},
		"empty":                          {"&secret=", "", 401},
		"empty bearer":                   {"", "Bearer ", 401},
		"basic alone":                    {"", "Basic " + base64.StdEncoding.EncodeToString([]byte(callerSecret)), 401},
		"wrong beside right":             {"&secret=" + callerSecret + "&serect=wrong", "", 401},
		"wrong beside bearer":            {"&secret=wrong", "Bearer " + callerSecret, 401},
		"a prefix":                       {"", "Bearer " + callerSecret[:5], 401},
		"longer":                         {"", "Bearer " + callerSecret + "x", 401},
		"another case":                   {"", "Bearer " + strings.ToUpper(callerSecret), 401},
		"bearer without a token":         {"", "Bearer", 401},
		"bearer and a tab":               {"", "Bearer\t" + callerSecret, 401},
		"repeated":                       {"&secret=" + callerSecret + "&secret=" + callerSecret, "", 400},
		"wrong, then right":              {"&secret=wrong&secret=" + callerSecret, "", 401},
		"right, then wrong":              {"&secret=" + callerSecret + "&secret=wrong", "", 401},
		"right, wrong, right":            {"&secret=" + callerSecret + "&secret=wrong&secret=" + callerSecret, "", 401},
		"right, then empty":              {"&serect=" + callerSecret + "&serect=", "", 401},
		"empty beside right":             {"&serect=&secret=" + callerSecret, "", 401},
		"without a value beside right":   {"&serect&secret=" + callerSecret, "", 401},
		"right, but the rest is not":     {"&all=maybe&secret=" + callerSecret, "", 400},
		"wrong, and the rest is not":     {"&all=maybe&secret=wrong", "", 401},
		"right, broken escape elsewhere": {"&x=%zz&secret=" + callerSecret, "", 400},
		"none, broken escape":            {"&x=%zz", "", 401},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			var header []string
			if test.header != "" {
				header = []string{"Authorization: " + test.header}
			}
			r := s.do(t.Context(), http.MethodGet, pair+test.query, header...)
			r.wantStatus(t, test.status)
			if test.status == 401 {
				r.wantProblem(t, 401, "unauthorized")
				challenge := `Bearer realm="fsbroker"`
				if strings.HasPrefix(strings.ToLower(test.header), "bearer") {
					challenge += `, error="invalid_token"`
				}
				r.wantHeader(t, "WWW-Authenticate", challenge)
				r.wantHeader(t, "X-Content-Type-Options", "nosniff")
				r.wantHeader(t, "Cache-Status", "fsbroker; detail=unauthorized")
			}
		})
	}

	// The secret is checked before anything else.
	s.do(t.Context(), http.MethodPost, "/task").wantProblem(t, 401, "unauthorized")
	s.do(t.Context(), http.MethodGet, "/task").wantProblem(t, 401, "unauthorized")
	s.wantNoSecretInLog()
}

// The header fields that the product's servers and its public clients use.
func TestSecretInHeader(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, "secret other {env.BROKER_SECRET}"))
	for name, test := range map[string]struct {
		header []string
		status int
	}{
		"secret":                        {[]string{"secret: " + callerSecret}, 200},
		"X-Api-Key":                     {[]string{"X-Api-Key: " + callerSecret}, 200},
		"in another case":               {[]string{"SECRET: " + callerSecret}, 200},
		"all":                           {[]string{"secret: " + callerSecret, "X-Api-Key: " + callerSecret, "Authorization: Bearer " + callerSecret}, 200},
		"of another client":             {[]string{"secret: " + brokerSecret}, 200},
		"repeated":                      {[]string{"secret: " + callerSecret, "secret: " + callerSecret}, 200},
		"wrong":                         {[]string{"secret: wrong"}, 401},
		"wrong X-Api-Key":               {[]string{"X-Api-Key: wrong"}, 401},
		"empty":                         {[]string{"secret: ", "X-Api-Key: "}, 401},
		"wrong beside a right one":      {[]string{"secret: wrong", "X-Api-Key: " + callerSecret}, 401},
		"wrong beside bearer":           {[]string{"X-Api-Key: wrong", "Authorization: Bearer " + callerSecret}, 401},
		"a wrong one repeated":          {[]string{"secret: " + callerSecret, "secret: wrong"}, 401},
		"a wrong X-Api-Key repeated":    {[]string{"X-Api-Key: wrong", "X-Api-Key: " + callerSecret}, 401},
		"empty beside a right one":      {[]string{"secret: ", "X-Api-Key: " + callerSecret}, 401},
		"an empty one repeated":         {[]string{"X-Api-Key: " + callerSecret, "X-Api-Key: "}, 401},
		"empty beside bearer":           {[]string{"secret: ", "Authorization: Bearer " + callerSecret}, 401},
		"with the word Bearer":          {[]string{"secret: Bearer " + callerSecret}, 401},
		"right, with a prefix missing":  {[]string{"secret: " + callerSecret[1:]}, 401},
		"a node's, not a caller's, one": {[]string{"secret: " + nodeSecret}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			s.do(t.Context(), http.MethodGet, pair, test.header...).wantStatus(t, test.status)
		})
	}
	if got := s.logged("ends up in logs"); len(got) > 0 {
		t.Errorf("a secret in a header is warned of: %v", got)
	}
	s.wantNoSecretInLog()
}

// Each line of Authorization with the scheme Bearer must be right, whatever follows the scheme. Other schemes are ignored.
func TestEveryAuthorizationCounts(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, "secret other {env.BROKER_SECRET}"))
	const right, basic = "Bearer " + callerSecret, "Basic YTpi"
	for name, test := range map[string]struct {
		authorization []string
		status        int
	}{
		"once":                  {[]string{right}, 200},
		"twice":                 {[]string{right, right}, 200},
		"of two clients":        {[]string{right, "Bearer " + brokerSecret}, 200},
		"beside basic":          {[]string{right, basic}, 200},
		"after basic":           {[]string{basic, right}, 200},
		"beside an empty line":  {[]string{right, ""}, 200},
		"then wrong":            {[]string{right, "Bearer wrong"}, 401},
		"after wrong":           {[]string{"Bearer wrong", right}, 401},
		"then basic and wrong":  {[]string{right, basic, "bearer wrong"}, 401},
		"then none":             {[]string{right, "Bearer"}, 401},
		"then a tab and wrong":  {[]string{right, "Bearer\twrong"}, 401},
		"then a tab and right":  {[]string{right, "Bearer\t" + callerSecret}, 401},
		"then a space, a tab":   {[]string{right, "Bearer \t" + callerSecret}, 401},
		"then without a space":  {[]string{right, "Bearer" + callerSecret}, 401},
		"then a colon":          {[]string{right, "Bearer: " + callerSecret}, 401},
		"then a comma":          {[]string{right, "Bearer, " + right}, 401},
		"as a list":             {[]string{right + ", " + right}, 401},
		"only basic":            {[]string{basic, basic}, 401},
		"without a space":       {[]string{"Bearer" + callerSecret}, 401},
		"then a space in front": {[]string{right, " \tBearer wrong"}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			header := make([]string, len(test.authorization))
			for i, value := range test.authorization {
				header[i] = "Authorization: " + value
			}
			s.do(t.Context(), http.MethodGet, pair, header...).wantStatus(t, test.status)
			if test.status == 401 {
				return
			}
			// What is right alone is wrong beside another way in which a secret is presented.
			for _, wrong := range []string{"&secret=wrong", "&serect="} {
				s.do(t.Context(), http.MethodGet, pair+wrong, header...).wantStatus(t, 401)
			}
			for _, wrong := range []string{"Secret: wrong", "X-Api-Key: "} {
				s.do(t.Context(), http.MethodGet, pair, append(header, wrong)...).wantStatus(t, 401)
			}
		})
	}
	s.wantNoSecretInLog()
}

func TestClientNames(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		secret portal portal-secret-1
		secret portal portal-secret-2
		node node-1 %s
	}
	log_append fsbroker_client {http.fsbroker.client}`, node.URL))

	for secret, name := range map[string]string{callerSecret: "default", "portal-secret-1": "portal", "portal-secret-2": "portal"} {
		s.do(t.Context(), http.MethodGet, pair, "Authorization: Bearer "+secret, "User-Agent: with "+secret[:7]).wantStatus(t, 200)
		logged := s.accessLog("with " + secret[:7])
		if logged["user_id"] != name || logged["fsbroker_client"] != name {
			t.Errorf("the access log has the clients %v and %v, want %s", logged["user_id"], logged["fsbroker_client"], name)
		}
	}
}

func TestSecretWithBraces(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, `secret braced a\{b\}c`))
	s.do(t.Context(), http.MethodGet, pair, "Authorization: Bearer a{b}c").wantStatus(t, http.StatusOK)
}
