"""Pairs of gold and boxed answers with a person's verdict: `gold | answer | C` (correct) or `W` (wrong)."""

PAIRS = r"""
10^{-31} | 10^{-30} | W
\frac{1}{2^{60}} | \frac{1}{2^{61}} | W
1/2^{60} | 2^{-60} | C
9.1\times10^{-31} | 1.6\times10^{-19} | W
6.02 \times 10^{23} | 6.02×10²³ | C
6.02 \times 10^{23} | 6.03×10²³ | W
0 | 10^{-31} | W
0 | 0.000001 | W
0 | -0.0 | C
hello | olleh | W
hello | Hello | C
hello | \text{hello} | C
listen | silent | W
abc | cba | W
abc | abc | C
2024-12-05 | 2024-05-12 | W
2024-12-05 | 2007 | W
1:3 | 10:30 | W
1:3 | 3:9 | W
1:3 | 1 : 3 | C
10:30 | 10:30 | C
10:30 | 1:3 | W
3 | n=3k, k\in\mathbb{Z} | W
4 | \geq 4 | W
6 | 2x=6 | W
6 | xy = 6 | W
6 | x+1=6 | W
6 | x^2=6 | W
36 | x = 36 | C
36 m/s | 36 km/h | W
36 m/s | 36 m/s | C
36 \text{ m/s} | 36 | C
7 | 3+4\mathrm{i} | W
7 | 3+4i | W
1+2i | 2i+1 | C
n=m | m=n | C
45 | 45° | C
45^\circ | 45° | C
-5 | –5 | C
-5 | −5 | C
0.5 | ½ | C
1.5 | 1½ | C
10000 | 10\,000 | C
1234567 | 1 234 567 | C
\frac{11}{4} | 2 3/4 | C
\frac{11}{4} | 2\frac34 | C
2.75 | 2 3/4 | C
\frac13 | 0.\dot3 | C
\frac13 | 0.\dot{3} | C
5 | 5=x | C
x=5 | 5=x | C
x=5 | 5 | C
12 | 12元 | C
(1,2,3) | \langle1,2,3\rangle | C
12.5 | 12.5\% | C
50 | 50\% | C
0.5 | 50\% | C
0.5 | 0.5\% | W
50\% | 0.5 | C
50\% | \frac12 | C
50\% | 5\% | W
1 | 100\% | C
12 | \$12 | C
12 | 12 dollars | C
\$12 | 12 | C
\$12 | €12 | W
[1,2] | x \in [1,2] | C
[1,2] | 1 \le x \le 2 | C
(1,2) | ]1,2[ | C
[1,2) | [1;2) | C
\{1,2,3\} | \{3,1,2\} | C
\{1,2,3\} | 3,2,1 | C
(1,2,3) | (3,2,1) | W
y=2x+1 | 2x - y + 1 = 0 | C
y=2x+1 | y-2x=1 | C
y=2x+1 | 2y=4x+2 | C
y=2x+1 | y=2x-1 | W
\{2,3\} | x=2 or x=3 | C
\{2,3\} | x=2 \text{ or } x=3 | C
2,3 | x_1=2, x_2=3 | C
\pm 2 | 2,-2 | C
x=\pm 2 | x=2 \text{ or } x=-2 | C
(x+1)^2 | x^2+2x+1 | C
11 | 4+7 | W
\frac{\pi}{2} | 1.5708 | W
\frac{\pi}{2} | 1.570796 | C
\pi | 3.14159 | C
\pi | 3.14 | W
\sqrt{2} | 1.41421 | C
\sqrt{2} | 1.414 | W
\frac13 | 0.333333 | C
\frac13 | 0.33 | W
3.14159 | 3.1415926 | C
0.3333 | 1/3 | W
true | True | C
true | false | W
Yes | yes | C
Yes | No | W
\infty | \infty | C
\infty | +\infty | C
\infty | -\infty | W
-\infty | \infty | W
\infty | infinity | C
\infty | \text{infinity} | C
\infty | ∞ | C
\infty | 10^{100} | W
\text{DNE} | \text{does not exist} | C
\text{undefined} | \text{undefined} | C
\frac{x}{y} | x/y | C
\frac{x+1}{2} | (x+1)/2 | C
\frac{1}{2x} | \frac{1}{2}x | W
e^{2x} | e^{2 x} | C
e^{2x} | \exp(2x) | C
e^{2x} | (e^x)^2 | C
\ln(x+1) | \log(1+x) | C
2\sin x\cos x | \sin 2x | C
2\sin x\cos x | \sin(2x) | C
\cos 2x | 1-2\sin^2 x | C
\cos 2x | 1-\sin^2 x | W
|x| | x | W
|x| | \sqrt{x^2} | C
x | |x| | W
x | \sqrt{x^2} | W
f(x) = x^2+1 | f(x)=1+x^2 | C
f(x) = x^2+1 | x^2+1 | C
f(x) = x^2+1 | f(x)=x^2 | W
f(x) = x^2+1 | y=x^2+1 | C
x^2+C | x^2 + C | C
x^2+C | x^2 | W
\frac{x^3}{3}+C | \frac13 x^3 + C | C
C_1 e^{x} + C_2 e^{-x} | C_2 e^{-x} + C_1 e^{x} | C
0.1\overline{6} | \frac16 | C
0.\overline{142857} | \frac17 | C
0.\overline{3} | 0.3 | W
0.\overline{3} | 0.333... | C
0.\overline{3} | 0.\overline{33} | C
\frac{5}{11} | 0.\overline{45} | C
\frac{5}{11} | 0.\dot4\dot5 | C
\frac{5}{11} | 0.4545... | C
\frac{5}{11} | 0.45 | W
1 | 0.\overline{9} | C
\frac{41}{333} | 0.\dot{1}2\dot{3} | C
B | (B) | C
B | B. | C
B | B) 12 | C
B | \textbf{(B)}\ 12 | C
B | b | W
B | A | W
B | (A) or (B) | W
B | A, B | W
B | not B | W
B | \text{Option B} | C
(B) | B | C
A | \text{(A)} | C
\text{(E)} | E | C
D | \mathrm{D} | C
1,2,3 | 1, 2, 3 | C
1,2,3 | 1, 2 | W
1,2,3 | 1, 2, 3, 4 | W
1,2,3 | (1,2,3) | C
(3,4) | 3,4 | W
(3,4) | (3, 4) | C
(3,4) | x=3, y=4 | C
(3,4) | x=4, y=3 | W
(3,4) | y=4, x=3 | C
\left(\frac12, 3\right) | (0.5, 3) | C
3 | 3 \text{ or } 4 | W
3 | 3, 4 | W
3 | \text{either } 3 \text{ or } 4 | W
3 | 3 \text{ (not 4)} | W
3 | \text{approximately } 3 | W
3 | \approx 3 | W
3 | 3 \text{ million} | W
3000000 | 3 \text{ million} | C
12 | 12 \text{ cm} | C
12 \text{ cm} | 12 | C
12 \text{ cm} | 12 \text{ m} | W
12 \text{ cm} | 0.12 \text{ m} | C
12 \text{ cm} | 120 mm | C
12 \text{ cm} | 12 cm | C
12 \text{ cm}^2 | 12 \text{ cm}^2 | C
12 \text{ cm}^2 | 12 \text{ square centimeters} | C
12 \text{ cm}^2 | 12 \text{ cm} | W
5 \text{ apples} | 5 \text{ oranges} | W
5 \text{ apples} | 5 | C
5 \text{ hours} | 300 \text{ minutes} | C
9.8 \text{ m/s}^2 | 9.8 m/s² | C
9.8 \text{ m/s}^2 | 9.8 \text{ m/s} | W
25 \text{ km/h} | 25 \text{ km per hour} | C
20^\circ\text{C} | 20 °C | C
20^\circ\text{C} | 20 °F | W
90^\circ | \frac{\pi}{2} | C
90^\circ | 90 \text{ degrees} | C
90^\circ | 100^\circ | W
\frac{\pi}{3} | 60^\circ | C
\frac{\pi}{3} | 60 | W
\begin{pmatrix}1\\2\end{pmatrix} | (1,2) | C
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix} | C
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix}2\\1\end{bmatrix} | W
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left[\begin{array}{cc}1&2\\3&4\end{array}\right] | C
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left(\begin{matrix}1&2\\3&4\end{matrix}\right) | C
\begin{pmatrix}1&2\\3&4\end{pmatrix} | A=\begin{pmatrix}1&2\\3&4\end{pmatrix} | C
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{vmatrix}1&2\\3&4\end{vmatrix} | W
(-\infty,1)\cup(1,\infty) | \mathbb{R}\setminus\{1\} | C
(-\infty,1)\cup(1,\infty) | x \neq 1 | C
(-\infty,0) | x<0 | C
(-\infty,0] | x<0 | W
x>3 | (3,\infty) | C
x>3 | x>2 | W
x>3 | 3<x | C
x>3 | y>3 | W
2<x<5 | (2,5) | C
2<x<5 | 2<x<=5 | W
x \le -1 \text{ or } x \ge 1 | (-\infty,-1]\cup[1,\infty) | C
-1 \le x \le 1 | |x| \le 1 | C
\emptyset | \varnothing | C
\emptyset | \text{No solution} | C
\emptyset | \{\} | C
\emptyset | 0 | W
\{0\} | 0 | C
\{0\} | \emptyset | W
\mathbb{R} | (-\infty,\infty) | C
\mathbb{R} | \mathbb{C} | W
\mathbb{Z} | \mathbb{Z} | C
2 \pm \sqrt{3} | 2+\sqrt3, 2-\sqrt3 | C
2 \pm \sqrt{3} | 2-\sqrt3 | W
2 \pm \sqrt{3} | 2\mp\sqrt{3} | C
\frac{-1\pm\sqrt5}{2} | \frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2} | C
x=1\pm i | x=1+i, x=1-i | C
12_{10} | 12 | C
1010_2 | 1010_{2} | C
1010_2 | 1010 | C
1010_2 | 10 | W
1010_2 | 1010_3 | W
FF_{16} | \text{FF}_{16} | C
0xff | 0xFF | C
3:30 \text{ PM} | 3:30 pm | C
3:30 \text{ PM} | 3:30 AM | W
3:30 \text{ PM} | 15:30 | C
July 4, 1776 | 1776-07-04 | C
July 4, 1776 | July 5, 1776 | W
Monday | \text{Monday} | C
Monday | Tuesday | W
Paris | \textbf{Paris} | C
New York | \text{New York} | C
New York | NewYork | W
x^2-1 | (x-1)(x+1) | C
(x-1)(x+1) | x^2-1 | C
x^{10} | x^10 | C
2^{100} | 2^{100} | C
2^{100} | 1267650600228229401496703205376 | C
2^{100} | 1267650600228229401496703205377 | W
100! | 100! | C
\binom{10}{3} | 120 | C
\frac{n(n+1)}{2} | \binom{n+1}{2} | C
\frac{n(n+1)}{2} | \frac{n(n-1)}{2} | W
\sqrt{2}+\sqrt{3} | \sqrt3+\sqrt2 | C
\sqrt{2}+\sqrt{3} | \sqrt{5+2\sqrt6} | C
\sqrt{2}+\sqrt{3} | \sqrt5 | W
\log_2 3 | \frac{\ln 3}{\ln 2} | C
\log_2 3 | \log_3 2 | W
\frac{1}{\sqrt2} | \frac{\sqrt2}{2} | C
1 | \sin^2 x+\cos^2 x | C
3/4 | 0.75 | C
3/4 | .75 | C
3/4 | 75\% | C
3/4 | \frac{6}{8} | C
-\frac34 | \frac{-3}{4} | C
-\frac34 | -0.75 | C
1.0 | 1 | C
5 | 5. | C
5 | 5,0 | W
2.5 | 2,5 | C
1,000 | 1000 | C
1,000 | 1.000 | W
1{,}000 | 1000 | C
1000 | 10^3 | C
1000 | 1e3 | C
1.5 \times 10^{3} | 1500 | C
42 | forty-two | C
42 | \text{forty-two} | C
42 | 24 | W
42 | 042 | C
42 | 42.0 | C
42 | +42 | C
42 | 42 \pmod{100} | C
3 | x \equiv 3 \pmod{7} | C
a^2+b^2 | b^2+a^2 | C
a^2+b^2 | (a+b)^2 | W
ab | ba | W
2ab | 2ba | C
2ab | 2 a b | C
AB = 5 | 5 | C
5 | AB = 5 | C
5 | \angle A = 5 | C
5 | \text{Area} = 5 | C
5 | -x = -5 | W
5 | x \ne 5 | W
5 | x < 5 | W
5 | f(x) = 5 | C
5 | 5x | W
5 | x5 | W
5 | 5 \times 1 | W
5 | \{5\} | C
5 | (5) | C
5 | [5] | W
5 | |5| | C
5 | |-5| | C
5 | \sqrt{25} | C
120 | 5! | C
1024 | 2^{10} | C
3 | \lfloor 3.7 \rfloor | C
u^2 | v^2 | W
\theta | θ | C
\alpha+\beta | β+α | C
x_1 | x_{1} | C
x_1 | x_2 | W
T | t | W
a | A | W
\frac{dy}{dx} = 2x | 2x | C
y' = 2x | 2x | C
x=2, y=3 | (2,3) | C
x=2, y=3 | y=3, x=2 | C
x=2, y=3 | x=3, y=2 | W
x = 2 \text{ and } y = 3 | (2,3) | C
x=1, x=2 | \{1,2\} | C
(1,2),(3,4) | (3,4),(1,2) | C
(1,2),(3,4) | (2,1),(4,3) | W
\{(1,2),(3,4)\} | (1,2) \text{ and } (3,4) | C
(a,b) | (a, b) | C
(a,b) | (b,a) | W
3x+2y=6 | 6x+4y=12 | C
3x+2y=6 | y = 3-\frac32 x | C
3x+2y=6 | 3x+2y=7 | W
x^2+y^2=4 | y^2+x^2=4 | C
x^2+y^2=4 | x^2+y^2=2 | W
x^2+y^2=4 | 4 | W
17 | 17 \text{ is wrong} | W
17 | \text{not } 17 | W
17 | 17 \text{ or more} | W
17 | 17+ | W
17 | \le 17 | W
17 | 17\% | C
17 | 17\text{th} | C
17 | \#17 | W
17 | 17, \ldots | W
17 | \{17, 17\} | C
17 | 17^{1} | C
17 | 17^{0} | W
17 | 1 7 | W
17 | 17 - | W
17 | -17 | W
17 | |x|=17 | W
17 | x=17 \text{ or } x=18 | W
17 | n=17, m=18 | W
17 | 17 < x < 18 | W
17 | 18 = 17 | W
17 | 17 = 18 | W
17 | 17 = 17 | C
17 | 17i | W
17 | 17x | W
17 | 17y^0 | C
17 | 17\pi | W
17 | 17!  | W
17 | 17e | W
17 | 17_{10} | C
17 | 0x17 | W
17 | 17/1 | C
17 | 34/2 | C
17 | 17\text{ mod } 20 | W
17 | \sqrt{289} | C
17 | 17\text{ cm} | C
17 | 17 \text{ hundred} | W
17 | 17 \text{ dozen} | W
17 | 17:00 | W
17 | 17.0001 | W
17 | 17.00000001 | W
17 | 16.9999999 | W
0.1 | 0.10000001 | W
0.5 | .5 | C
0.5 | 5 \times 10^{-1} | C
0.5 | 1/2 | C
0.5 | 2^{-1} | C
0.5 | -0.5 | W
100 | 1e2 | C
100 | 100.00 | C
123456789 | 123456788 | W
123456789 | 1.23456789 \times 10^8 | C
123456789 | 1.2346 \times 10^8 | W
\frac{355}{113} | \pi | W
\pi | \frac{355}{113} | W
\pi | \frac{22}{7} | W
\pi | 3.141592653589793 | C
\pi | 3.141592653589794 | W
e | 2.71828 | C
e | 2.718 | W
\sqrt{2} | 1.4142135623730951 | C
\sqrt{2} | -\sqrt{2} | W
\sqrt{2} | \pm\sqrt{2} | W
\sqrt{2} | \frac{2}{\sqrt 2} | C
\sqrt{2} | \sqrt2 \approx 1.414 | C
\sqrt{2} | \approx 1.41421 | W
\frac{1}{3} | 0.3333333333 | C
\frac{1}{3} | 0.33334 | W
\frac{1}{3} | 33.33\% | W
\frac{1}{3} | 33\frac13\% | C
\frac{2}{3} | 0.666667 | C
\frac{2}{3} | 1 - \frac13 | W
x+1 | 1+x | C
x+1 | x+1+0 | C
x+1 | x | W
x+1 | x+1.0 | C
x+1 | y+1 | W
x+1 | X+1 | W
x^2 | x*x | C
x^2 | x**2 | C
x^2 | xx | C
x^2 | 2x | W
2^x | x^2 | W
2^x | 2**x | C
\sin x | \sin(x) | C
\sin x | sin(x) | C
\sin x | \sin^2 x | W
\sin^2 x | (\sin x)^2 | C
\sin^2 x | \sin(x)^2 | C
\sin^2 x | \sin x^2 | W
\tan^{-1} x | \arctan x | C
\tan^{-1} x | \frac{1}{\tan x} | W
\ln x | \log_e x | C
\ln x | \log_{10} x | W
\log_{10} 2 | \frac{\ln 2}{\ln 10} | C
e^{i\pi} | -1 | C
(1+i)^2 | 2i | C
i | -i | W
i | \sqrt{-1} | C
2+3i | 2+3j | W
2+3i | (2,3) | W
3-4i | -4i+3 | C
\frac{1+i}{2} | 0.5+0.5i | C
x=\frac{1}{2} | x=0.5 | C
x=\frac{1}{2} | y=0.5 | W
x=\frac{1}{2} | 0.5 | C
x=\frac{1}{2} | 2x=1 | W
y=x | x=y | C
y=x | y=2x | W
y=x | x-y=0 | C
y=x | y-x=0 | C
a=b+c | b+c=a | C
a=b+c | a-b=c | C
F=ma | F=am | C
x<y | y>x | C
x<y | x>y | W
x<y | x \le y | W
x>0 | x\geq0 | W
x>0 | (0,\infty) | C
x>0 | 0<x<\infty | C
x \geq 2 | [2,\infty) | C
x \geq 2 | x \ge 2.0 | C
[0,1] | [0,1) | W
[0,1] | (0,1) | W
[0,1] | 0\le x\le1 | C
[0,1] | [1,0] | W
[0,1] | \{0,1\} | W
[0,1] | [0, 2] | W
(0,1) | \{0,1\} | W
(0,1) | (0;1) | C
(0,1] \cup [2,3) | [2,3)\cup(0,1] | C
(0,1] \cup [2,3) | (0,3) | W
\{1,2\} | \{1,2,2\} | C
\{1,2\} | \{1\} | W
\{1,2\} | (1,2) | W
\{1,2\} | 1 \text{ and } 2 | C
\{1,2\} | 1 or 2 | C
\{1,2\} | x\in\{1,2\} | C
\{a,b\} | \{b,a\} | C
\{(0,1)\} | (0,1) | C
\{-1,0,1\} | 0,\pm1 | C
\{-1,0,1\} | \{0,\pm1\} | C
\{x : x > 0\} | (0, \infty) | C
\{x \mid x \ne 2\} | (-\infty,2)\cup(2,\infty) | C
(1,-1) | (1, -1) | C
(1,-1) | (-1,1) | W
(1,-1) | 1, -1 | W
(1,2,3) | 1,2,3 | C
(1,2,3) | \{1,2,3\} | W
(1,2,3) | [1,2,3] | C
(\frac{1}{2},\frac{1}{3}) | (0.5,\frac{1}{3}) | C
(2+3, 1) | (5,1) | C
(5,1) | (2+3,1) | W
\begin{bmatrix}1&0\\0&1\end{bmatrix} | I | W
\begin{bmatrix}1&0\\0&1\end{bmatrix} | \begin{bmatrix}1&0\\0&1.0\end{bmatrix} | C
\begin{bmatrix}1&2\end{bmatrix} | \begin{bmatrix}1\\2\end{bmatrix} | W
\begin{bmatrix}1\\2\\3\end{bmatrix} | \langle 1,2,3\rangle | C
\begin{bmatrix}1\\2\\3\end{bmatrix} | \begin{bmatrix}1&2&3\end{bmatrix}^T | C
\begin{bmatrix}1\\2\\3\end{bmatrix} | 1,2,3 | C
cat | act | W
cat | Cat | C
cat | "cat" | C
cat | 'cat' | C
cat | cat. | C
cat | cats | W
cat, dog | dog, cat | W
cat, dog | cat, dog | C
cat, dog | cat,dog | C
co-op | op-co | W
x-ray | x-yar | W
A B C | C B A | W
ABC | CBA | W
ABC | A, B, C | W
ABC | \triangle ABC | W
\text{red} | \text{blue} | W
\text{red} | \textit{red} | C
\text{red} | \text{ red } | C
\text{red} | der | W
\text{red} | \text{dark red} | W
increasing | decreasing | W
even | odd | W
rational | irrational | W
convergent | divergent | W
no | No. | C
no | on | W
True | Yes | W
2:3 | \frac23 | C
2:3 | 2/3 | C
2:3 | 3:2 | W
2:3 | 2 : 3 | C
2:3 | 2 \text{ to } 3 | C
2:3 | 4:6 | W
1:2:3 | 1:2:3 | C
1:2:3 | 3:2:1 | W
12:30 | 0:30 | W
12:30 | 12:30 | C
12:30 | 12:30 PM | C
7:05 | 7:50 | W
2023-01-01 | January 1, 2023 | C
2023-01-01 | 2021 | W
12/25/2020 | 25/12/2020 | W
12/25/2020 | 12/25/2020 | C
555-1234 | -679 | W
555-1234 | 555-1234 | C
3-2 | 1 | W
3-2 | 2-3 | W
H2O | H2O | C
H2O | OH2 | W
NaCl | ClNa | W
1010 | 1010 | C
0101 | 101 | W
0101 | 0101 | C
1 2 3 | 3 2 1 | W
1 2 3 | 1 2 3 | C
1 2 3 | 6 | W
1 2 3 | 123 | W
[1, 2, 3] | [3, 2, 1] | W
[3, 1] | [1, 3] | W
[] | [] | C
[[1,2],[3,4]] | [[1,2],[3,4]] | C
[[1,2],[3,4]] | [[2,1],[3,4]] | W
C | c | W
E | 5 | W
(A) | A | C
(A) | \text{A) foo} | C
A) 12 | A | C
A) 12 | (A) 12 | C
A) 12 | (A) 13 | W
\text{(A) } 12 | A | C
\text{(A) } 12 | 12 | W
A | A and B | W
A | \text{A, B and C} | W
A | \text{A or B} | W
A | \text{A (not B)} | W
A | \text{(A) because B is wrong} | W
\textbf{(A)} | a | W
\$5 | \$5.00 | C
\$5 | 5 dollars | C
\$5 | 500 cents | C
\$5 | 5 cents | W
\$5 | 5\text{ euros} | W
£3 | £3 | C
£3 | 3 | C
5\text{ million} | 5000000 | C
5\text{ million} | 5 | W
5 \text{ km} | 5000 \text{ m} | C
5 \text{ km} | 5 \text{ miles} | W
5 \text{ km} | 5 | C
60 \text{ mph} | 60 \text{ miles per hour} | C
60 \text{ mph} | 60 mi/h | C
10 \text{ m/s} | 36 km/h | C
10 \text{ N} | 10 \text{ J} | W
100 \text{ cm}^3 | 100 \text{ mL} | W
3 \text{ ft} | 36 \text{ inches} | C
2 \text{ hours } 30 \text{ minutes} | 2.5 \text{ hours} | C
2 \text{ hours } 30 \text{ minutes} | 150 minutes | C
2 \text{ hours } 30 \text{ minutes} | 2 hours 20 minutes | W
7 \text{ days} | 1 week | C
7 \text{ days} | 7 | C
7 \text{ days} | 7 \text{ hours} | W
30^\circ | 30 | C
30^\circ | \frac{\pi}{6} | C
30^\circ | 0.5236 | W
30^\circ | 30' | W
\frac{\pi}{6} | 30^\circ | C
\frac{\pi}{6} | 30 | W
20\% | 20 | C
20\% | 0.2 | C
20\% | 1/5 | C
20\% | 2\% | W
20\% | 20\text{ percent} | C
20\% | 20 \text{ cm} | W
0.2\% | 0.2 | W
0.2\% | 0.002 | C
0.2\% | 20\% | W
150 | 150\% | C
1.5 | 150\% | C
1.5 | 1.5\% | C
f(x)=2x | f(x)=2x | C
f(x)=2x | g(x)=2x | W
f(x)=2x | f(x)=x^2 | W
\frac{1}{x} | x^{-1} | C
\frac{a}{b+c} | a/(b+c) | C
\frac{a}{b+c} | a/b+c | W
\frac{x}{2}+1 | x/2+1 | C
\sqrt{x+1} | (x+1)^{1/2} | C
\sqrt{x+1} | \sqrt{x}+1 | W
\sqrt[3]{x} | x^{1/3} | C
|x-1| | |1-x| | C
n! | n(n-1)! | C
n! | (n+1)! | W
\sum_{k=1}^n k | \frac{n(n+1)}{2} | C
\frac{n(n+1)}{2} | \sum_{k=1}^n k | W
\max(a,b) | \max(b,a) | C
\max(a,b) | \min(a,b) | W
\lfloor x \rfloor | \lceil x \rceil | W
\infty | does not exist | W
\text{no real solutions} | \emptyset | C
k\pi, k\in\mathbb{Z} | n\pi, n\in\mathbb{Z} | C
k\pi, k\in\mathbb{Z} | k\pi | W
k\pi, k\in\mathbb{Z} | 2k\pi, k\in\mathbb{Z} | W
2k+1 | 2n+1 | W
5x^2+3x | x(5x+3) | C
5x^2+3x | 5x^2+3 | W
-x | x | W
-(x-1) | 1-x | C
a-b | b-a | W
10^{10^{10}} | 10^{10^{10}} | C
9^{9^{9}} | 1 | W
2^{1000} | 2^{1001} | W
10^{-20} | 0 | W
10^{-20} | 10^{-21} | W
\frac{1}{10^{50}} | \frac{1}{10^{51}} | W
\sqrt{2}\cdot10^{-30} | \sqrt{3}\cdot10^{-30} | W
x\cdot 10^{-40} | 2x\cdot10^{-40} | W
3 | 3\approx 4 | W
0.5 | 0.5 \text{ or } \frac12 | C
0.5 | 0.5 \text{ or } \frac13 | W
3 | \sqrt{9}\approx \text{cm} | W
\sqrt{2} | \sqrt{2}\approx 1.41 | C
3 | 0\binom{3}{1} | W
6 | 2\binom{3}{1} | W
5 | 2\binom{3}{1} | W
5 | {2}{3} | W
5 | 2(3) | W
5 | 2 3 | W
3 | \binom{3}{1}\%\%Bi | W
3 | 3\text{ cm}x | W
3 | 3 iA | W
3 | 3 _2 | W
3 | 3' | W
3 | \cup=3 | W
3 | x=\frac=3 | W
3 | x = 12/4 = 3 | C
3 | x = 11/4 = 3 | W
55 | S = 1+2+\cdots+10 = 55 | C
A | \text{ and } | W
5 | \pmod{7} | W
"""

# correct answers that are refused, such as equations solved for another letter
REFUSED = r"""
xy=1 | y=\frac1x | C
F=ma | a=\frac{F}{m} | C
\begin{pmatrix}2\\0\end{pmatrix} | \binom{2}{0} | C
FF | ff | C
"""


def rows(table: str) -> list[tuple[str, str, bool]]:
    """Return the gold answer, the answer and whether it is correct, for each line."""
    split = [line.rsplit(" | ", 1) for line in table.strip().splitlines()]
    return [(*pair.split(" | ", 1), verdict == "C") for pair, verdict in split]  # type: ignore[misc]
